"""RMSNorm in plain torch: `weight * x / rms(x)` over the last dimension, and the same after a residual addition."""

import torch


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one fp32 scalar per row for backward, no fp32 copies."""

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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + x
    return rms_norm(total, weight, eps), total
