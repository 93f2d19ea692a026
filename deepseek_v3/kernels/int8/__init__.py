"""Linear layers in 8-bit integers: weights with a scale per output, activations with a scale per token (W8A8)."""

import torch

from ..dispatch import custom_op, uses_triton
from ..grouped import check_offsets
from . import reference


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest, symmetric, with `scale = max|w| / 127` over the inputs of each output.

    `weight [..., out, in]` floating point -> `codes [..., out, in]` int8 in -127..127 and `scale [..., out, 1]` in the
    weight's dtype, with `weight ~ codes * scale`. These are the `weight` and `weight_scale` of compressed-tensors'
    `int-quantized` format (W8A8).
    """
    if not weight.is_floating_point() or weight.dim() < 2:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}; it has to be [..., out, in] and floating point"
        )
    return reference.quantize_int8(weight)


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`codes * scale`, rounded once: `codes [..., out, in]` int8, `scale [..., out, 1]` -> `[..., out, in]` in `dtype`
    (the scale's if None)."""
    _check(codes, scale)
    return reference.dequantize_int8(codes, scale, scale.dtype if dtype is None else dtype)


def quantize_activation_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token, symmetric, dynamic: `x [M, K]` -> `codes [M, K]` int8 and `scale [M, 1]` fp32.

    In fp32: `scale = max(max|x| / 127, 2^-126)` over a row, `codes = round(x / scale)`, to nearest even. NaN or Inf in
    a row makes its scale NaN or Inf. The outputs have no gradient.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; allowed: floating point [M, K]")
    with torch.no_grad():
        if not uses_triton(x):
            return reference.quantize_activation_int8(x)
        return torch.ops.deepseek_v3.quantize_activation_int8(x)


def int8_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x W^T` in 8-bit integers: `x [..., in]`, `codes [out, in]`, `scale [out, 1]` -> `[..., out]` in x's dtype.

    x is quantized per token (`quantize_activation_int8`); the integers are multiplied and summed exactly in int32;
    the sum times `scale` times the token's scale is computed in fp32 and rounded once. The gradient of x is given, as
    if x had not been rounded: `grad @ (codes * scale)`. Codes and scale have none.
    """
    _check(codes, scale)
    if codes.dim() != 2 or x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"x is {list(x.shape)} and codes {list(codes.shape)}; they have to be [..., in] and [out, in]"
        )
    if not uses_triton(x):
        return reference.int8_linear(x, codes, scale)
    y = torch.ops.deepseek_v3.int8_linear(x.reshape(-1, x.shape[-1]), codes, scale, None)
    return y.view(*x.shape[:-1], codes.shape[0])


def int8_grouped_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """`int8_linear` with one weight per expert: `x [M, K]` sorted by expert, `codes [E, N, K]`, `scale [E, N, 1]` ->
    `[M, N]`.

    Expert e has the rows from `offsets[e]` to `offsets[e+1]`, int32 `[E+1]` on x's device, which a GPU is not waited
    for; rows from `offsets[E]` on become zeros. Experts without rows are not read.
    """
    _check(codes, scale)
    if x.dim() != 2 or codes.dim() != 3 or x.shape[1] != codes.shape[2]:
        raise ValueError(f"x is {list(x.shape)} and codes {list(codes.shape)}; they have to be [M, K] and [E, N, K]")
    check_offsets(offsets, codes.shape[0])
    if not uses_triton(x):
        return reference.int8_grouped_linear(x, codes, scale, offsets)
    return torch.ops.deepseek_v3.int8_linear(x, codes, scale, offsets)


def _check(codes: torch.Tensor, scale: torch.Tensor) -> None:
    if codes.dtype != torch.int8:
        raise ValueError(f"codes is {codes.dtype}; it has to be torch.int8")
    if codes.dim() < 2 or list(scale.shape) != [*codes.shape[:-1], 1] or not scale.is_floating_point():
        raise ValueError(
            f"codes is {list(codes.shape)} and scale {scale.dtype} {list(scale.shape)}; they have to be "
            "[..., out, in] and floating point [..., out, 1]"
        )


@custom_op("deepseek_v3::quantize_activation_int8")
def _quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_impl import quantize_activation_int8

    return quantize_activation_int8(x)


@_quantize_activation.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@custom_op("deepseek_v3::int8_linear")
def _forward(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    from .triton_impl import int8_linear_forward

    return int8_linear_forward(x, codes, scale, offsets)


@_forward.register_fake
def _(x, codes, scale, offsets):
    return x.new_empty(x.shape[0], codes.shape[-2])


@custom_op("deepseek_v3::int8_linear_backward")
def _backward(
    grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    from .triton_impl import int8_linear_backward

    return int8_linear_backward(grad, codes, scale, offsets)


@_backward.register_fake
def _(grad, codes, scale, offsets):
    return grad.new_empty(grad.shape[0], codes.shape[-1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, grad):
    return torch.ops.deepseek_v3.int8_linear_backward(grad, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
