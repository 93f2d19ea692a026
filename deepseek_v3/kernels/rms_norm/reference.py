"""RMSNorm in plain torch: `weight * x / rms(x)` over the last dimension, and the same after a residual addition."""

import torch

from ..blocks import row_blocks


class _RMSNorm(torch.autograd.Function):
    """Over rows `[N, C]`. Keeps the input and one fp32 scalar per row for backward, no fp32 copies."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
        for x_, y_, scale_ in row_blocks(x, y, scale):
            x32 = x_.float()
            scale_.copy_(x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_())
            y_.copy_((x32 * scale_).to(x.dtype)).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight, scale = ctx.saved_tensors
        grad_x, weight32 = torch.empty_like(x), weight.float()
        grad_weight = torch.zeros_like(weight32) if ctx.needs_input_grad[1] else None
        for x_, grad_, scale_, grad_x_ in row_blocks(x, grad, scale, grad_x):
            grad32, normed = grad_.float(), x_.float() * scale_  # not in place: float() of fp32 is the saved input
            if grad_weight is not None:
                grad_weight += (grad32 * normed).sum(0)
            grad32 = grad32 * weight32
            projection = (grad32 * normed).mean(-1, keepdim=True)
            grad_x_.copy_(grad32.addcmul_(normed, projection, value=-1).mul_(scale_))
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled():  # decoding: one row costs less than its bookkeeping
        x32 = x.float()
        return (x32 * x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).to(x.dtype) * weight
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + x
    return rms_norm(total, weight, eps), total
