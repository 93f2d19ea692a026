"""Matrix products of FP8 operands in plain torch: dequantize, multiply in fp32. And the linear layers made of them."""

from itertools import pairwise

import torch

from ..fp8_quant.reference import (
    TILE,
    dequantize,
    quantize_activation,
    quantize_activation_transposed,
    quantize_weight,
)


def gemm(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    return (dequantize(a, a_scale, torch.float32) @ dequantize(b, b_scale, torch.float32).mT).to(out_dtype)


def grouped_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    bounds = pairwise(offsets.tolist())
    parts = [gemm(a[i:j], a_scale[i:j], b[e], b_scale[e], out_dtype) for e, (i, j) in enumerate(bounds)]
    return torch.cat(parts)


def grouped_wgrad(
    grad_t: torch.Tensor,
    grad_t_scale: torch.Tensor,
    x_t: torch.Tensor,
    x_t_scale: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    grad_t, x_t = dequantize(grad_t, grad_t_scale, torch.float32), dequantize(x_t, x_t_scale, torch.float32)
    parts = []
    for expert, (i, j) in enumerate(pairwise(offsets.tolist())):
        first = (i // TILE + expert) * TILE
        parts.append(grad_t[:, first : first + j - i] @ x_t[:, first : first + j - i].T)
    return torch.stack(parts).to(out_dtype)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        x_t = quantize_activation_transposed(x, offsets, False) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(weight, offsets, *x_t)
        a, b = quantize_activation(x, False), quantize_weight(weight, False, False)
        return gemm(*a, *b, x.dtype) if offsets is None else grouped_gemm(*a, *b, offsets, x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        weight, offsets, x_t, x_t_scale = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            a, b = quantize_activation(grad, False), quantize_weight(weight, True, False)
            grad_x = gemm(*a, *b, grad.dtype) if offsets is None else grouped_gemm(*a, *b, offsets, grad.dtype)
        if ctx.needs_input_grad[1]:
            operands = *quantize_activation_transposed(grad, offsets, False), x_t, x_t_scale
            if offsets is None:
                grad_weight = gemm(*operands, weight.dtype)
            else:
                grad_weight = grouped_wgrad(*operands, offsets, weight.dtype)
        return grad_x, grad_weight, None


def linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    return _FP8Linear.apply(x, weight, offsets)
