"""Linear layers whose weights are 4-bit integers with a scale per group, for inference and for frozen weights."""

import torch

from ..dispatch import custom_op, uses_triton
from ..grouped import check_offsets
from . import reference
from .reference import CpuPacked
from .reference import pack_int4 as pack_int4

GROUP_SIZES = (32, 64, 128, 256)


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest, symmetric, with `scale = max|w| / 7.5` over each group of consecutive inputs.

    `weight [..., out, in]` floating point -> `packed [..., out, in / 8]` int32 and `scale [..., out, in / group_size]`
    in the weight's dtype, with `weight ~ q * scale`, `q = round(weight / scale)` in -8..7. Bits 4j..4j+3 of a word
    hold `q + 8` of its element j. These are the `weight_packed` and `weight_scale` of compressed-tensors'
    `pack-quantized` format (W4A16).
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; allowed: {GROUP_SIZES}")
    if not weight.is_floating_point() or weight.dim() < 2:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}; it has to be [..., out, in] and floating point"
        )
    if weight.shape[-1] % group_size:
        raise ValueError(f"weight has {weight.shape[-1]} inputs, which is no multiple of group_size {group_size}")
    return reference.quantize_int4(weight, group_size)


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`q * scale`, rounded once: `packed [..., out, in / 8]`, `scale [..., out, in / group]` -> `[..., out, in]` in
    `dtype` (the scale's if None)."""
    _check(packed, scale)
    dtype = scale.dtype if dtype is None else dtype
    if not uses_triton(scale) or dtype == torch.float64:
        return reference.dequantize_int4(packed, scale, dtype)
    return torch.ops.deepseek_v3.dequantize_int4(packed, scale, dtype)


def pack_int4_for_cpu(packed: torch.Tensor, scale: torch.Tensor) -> CpuPacked:
    """The weight once more (4 bits), in the layout of torch's INT4 kernel for CPUs: made once, when a model is loaded.

    `packed [out, in / 8]`, or `[E, out, in / 8]` for the experts of `int4_grouped_linear`. With it the product of a
    few bf16 rows takes less time than a bf16 layer's; other rows need `packed` as before. Scales are rounded to bf16.
    """
    _check(packed, scale)
    if packed.is_cuda or packed.dim() > 3:
        raise ValueError(
            f"packed is {list(packed.shape)} on {packed.device}; it has to be [out, in / 8] or [E, out, in / 8] on a "
            "CPU"
        )
    return reference.pack_int4_for_cpu(packed, scale)


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, cpu_packed: CpuPacked | None = None
) -> torch.Tensor:
    """`x @ (q * scale).T`, accumulated in fp32: `x [..., in]`, `packed [out, in / 8]`, `scale [out, in / group]` ->
    `[..., out]` in x's dtype.

    The gradient of `x` is given, so that adapters can be trained around the layer; packed and scale have none. Few
    rows are multiplied with the 4-bit weight directly, for many (and in fp32, and for the gradient) it is dequantized
    first: on a GPU all of it for the duration of the call, on a CPU part after part. `cpu_packed` is used on a CPU
    (`pack_int4_for_cpu`).
    """
    _check(packed, scale)
    if packed.dim() != 2 or x.shape[-1] != packed.shape[1] * 8:
        raise ValueError(
            f"x is {list(x.shape)} and packed {list(packed.shape)}; they have to be [..., in] and [out, in / 8]"
        )
    if not uses_triton(x):
        return reference.int4_linear(x, packed, scale, cpu_packed)
    y = torch.ops.deepseek_v3.int4_linear(x.reshape(-1, x.shape[-1]), packed, scale)
    return y.view(*x.shape[:-1], packed.shape[0])


def int4_grouped_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    cpu_packed: CpuPacked | None = None,
) -> torch.Tensor:
    """`int4_linear` with one weight per expert: `x [M, K]` sorted by expert, `packed [E, N, K / 8]`,
    `scale [E, N, K / group]` -> `[M, N]`.

    Expert e has the rows from `offsets[e]` to `offsets[e+1]`, int32 `[E+1]` on x's device, which a GPU is not waited
    for; rows from `offsets[E]` on become zeros. Experts without rows are not read. On a GPU the 4-bit weights are
    multiplied however many rows there are, and dequantized for the gradient only.
    """
    _check(packed, scale)
    if x.dim() != 2 or packed.dim() != 3 or x.shape[1] != packed.shape[2] * 8:
        raise ValueError(
            f"x is {list(x.shape)} and packed {list(packed.shape)}; they have to be [M, K] and [E, N, K / 8]"
        )
    check_offsets(offsets, packed.shape[0])
    if not uses_triton(x):
        return reference.int4_grouped_linear(x, packed, scale, offsets, cpu_packed)
    return torch.ops.deepseek_v3.int4_grouped_linear(x, packed, scale, offsets)


def _check(packed: torch.Tensor, scale: torch.Tensor) -> None:
    if packed.dtype != torch.int32:
        raise ValueError(f"packed is {packed.dtype}; it has to be torch.int32")
    sizes = [scale.shape[-1] * group // 8 for group in GROUP_SIZES]
    if packed.dim() < 2 or packed.shape[:-1] != scale.shape[:-1] or packed.shape[-1] not in sizes:
        raise ValueError(
            f"packed is {list(packed.shape)} and scale {list(scale.shape)}; they have to be [..., out, in / 8] and "
            f"[..., out, in / group] with a group of {GROUP_SIZES}"
        )


@custom_op("deepseek_v3::dequantize_int4")
def _dequantize(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .triton_impl import dequantize_int4

    return dequantize_int4(packed, scale, dtype)


@_dequantize.register_fake
def _(packed, scale, dtype):
    return scale.new_empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=dtype)


@custom_op("deepseek_v3::int4_linear")
def _forward(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from .triton_impl import int4_linear_forward

    return int4_linear_forward(x, packed, scale)


@_forward.register_fake
def _(x, packed, scale):
    return x.new_empty(x.shape[0], packed.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, grad):
    packed, scale = ctx.saved_tensors
    return torch.mm(grad, torch.ops.deepseek_v3.dequantize_int4(packed, scale, grad.dtype)), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@custom_op("deepseek_v3::int4_grouped_linear")
def _grouped_forward(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    from .triton_impl import int4_grouped_linear_forward

    return int4_grouped_linear_forward(x, packed, scale, offsets)


@_grouped_forward.register_fake
def _(x, packed, scale, offsets):
    return x.new_empty(x.shape[0], packed.shape[1])


@custom_op("deepseek_v3::int4_grouped_linear_backward")
def _grouped_backward(
    grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    from .triton_impl import int4_grouped_linear_backward

    return int4_grouped_linear_backward(grad, packed, scale, offsets)


@_grouped_backward.register_fake
def _(grad, packed, scale, offsets):
    return grad.new_empty(grad.shape[0], packed.shape[2] * 8)


def _grouped_autograd(ctx, grad):
    return torch.ops.deepseek_v3.int4_grouped_linear_backward(grad, *ctx.saved_tensors), None, None, None


_grouped_forward.register_autograd(_grouped_autograd, setup_context=_setup_context)
