"""The small layers every block uses: linear, embedding, RMSNorm, SwiGLU feed-forward (dense, shared experts)."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration import DeepseekV3Config
from ..kernels.embedding import embedding
from ..kernels.linear import linear
from ..kernels.rms_norm import add_rms_norm, rms_norm


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


class DeepseekV3Linear(nn.Linear):
    """`nn.Linear`, through `kernels.linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


class DeepseekV3Embedding(nn.Embedding):
    """`nn.Embedding`, through `kernels.embedding`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return embedding(input, self.weight, self.padding_idx)


def plain_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight `[out, in]` in `dtype` if `layer` does nothing but multiply by it, or None: an adapter, a hook, an
    offloaded or distributed layer has to be called instead. A packed layer gives a dequantized copy that it keeps."""
    if layer._forward_pre_hooks or layer._forward_hooks or hasattr(layer, "_hf_hook"):
        return None
    if type(layer) is nn.Linear:
        return layer.weight if layer.weight.dtype == dtype else None
    dequantized = getattr(type(layer), "plain_weight", None)
    return None if dequantized is None else dequantized(layer, dtype)


class DeepseekV3RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32, returned in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm; with a residual the norm of `residual + hidden_states`, and that sum."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class DeepseekV3MLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`, `[..., H] -> [..., H]`."""

    def __init__(self, config: DeepseekV3Config, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = DeepseekV3Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = DeepseekV3Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = DeepseekV3Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
