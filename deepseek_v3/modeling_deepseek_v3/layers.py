"""The two small layers every block uses: RMSNorm and the SwiGLU feed-forward network (dense, shared experts)."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration import DeepseekV3Config


class Fp32Buffers(nn.Module):
    """A module whose own buffers stay fp32 whatever it is cast to: `model.to(bfloat16)` would round them for good."""

    def _apply(self, fn, recurse=True):
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device, torch.float32))
        return self


class _RMSNorm(torch.autograd.Function):
    """`weight * x / rms(x)` in fp32; keeps the input and one fp32 scalar per row for backward, no fp32 copies."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x32 * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight, scale = ctx.saved_tensors
        grad32, normed = grad.float(), x.float() * scale  # not in place: float() of fp32 is the saved input itself
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad32 * normed).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
        grad32 = grad32 * weight.float()
        projection = (grad32 * normed).mean(-1, keepdim=True)
        return grad32.addcmul_(normed, projection, value=-1).mul_(scale).to(x.dtype), grad_weight, None


class DeepseekV3RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32, returned in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class DeepseekV3MLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`, `[..., H] -> [..., H]`."""

    def __init__(self, config: DeepseekV3Config, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
