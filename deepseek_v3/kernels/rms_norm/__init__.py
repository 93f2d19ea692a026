"""RMSNorm over the last dimension, alone or fused with the residual addition before it."""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))`: in fp32, the quotient rounded to `x`'s dtype before the product.

    `x [..., C]`, `weight [C]`, floating point -> `[..., C]` in the wider of the two dtypes.
    """
    if not uses_triton(x):
        return reference.rms_norm(x, weight, eps)
    return torch.ops.deepseek_v3.rms_norm(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`total = residual + x` (one shape; the wider of two dtypes) -> `rms_norm(total)` and `total`, in one pass."""
    if not uses_triton(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    dtype = torch.promote_types(x.dtype, residual.dtype)  # they differ under autocast: the kernel rounds to x's
    y, total, _ = torch.ops.deepseek_v3.rms_norm(x.to(dtype), residual.to(dtype), weight, eps)
    return y, total


@custom_op("deepseek_v3::rms_norm")
def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import rms_norm_forward

    return rms_norm_forward(x, residual, weight, eps)


@_forward.register_fake
def _(x, residual, weight, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    total = x.new_empty(x.shape if residual is not None else (0,))
    return y, total, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@custom_op("deepseek_v3::rms_norm_backward")
def _backward(
    grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_impl import rms_norm_backward

    return rms_norm_backward(grad, grad_total, x, weight, scale)


@_backward.register_fake
def _(grad, grad_total, x, weight, scale):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, weight, scale)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, grad_total, _):
    normed, weight, scale = ctx.saved_tensors
    if grad is None:  # only the sum was used
        return grad_total, grad_total, None, None
    grad_x, grad_weight = torch.ops.deepseek_v3.rms_norm_backward(
        grad, grad_total if ctx.added else None, normed, weight, scale
    )
    return grad_x, grad_x if ctx.added else None, grad_weight, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
