"""FP8 with fine-grained scales (DeepSeek-V3, section 3.3.2): 1x128 tiles of activations, 128x128 blocks of weights.

All in fp32: `scale = max(absmax / 448, 2^-126)` and `codes = x * (1 / scale)`, rounded to the nearest e4m3 number,
ties to even; `codes * scale` dequantizes. A tile of zeros has scale 2^-126 and dequantizes to zeros; the bound is the
smallest normal fp32 number, so no scale is denormal. With `power_of_two`, scales are rounded up to a power of two.
NaN becomes NaN and leaves its tile's other values alone; Inf makes its whole tile NaN. Nothing here has a gradient.
"""

import torch

from ..dispatch import custom_op, uses_triton
from ..grouped import check_offsets
from . import reference

E4M3 = torch.float8_e4m3fn


def quantize_activation_fp8(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`x [M, K]` in 1x128 tiles, the last may be shorter -> codes e4m3 `[M, K]`, scale fp32 `[M, ceil(K/128)]`."""
    _check_activation(x)
    if not uses_triton(x):
        return reference.quantize_activation(x.detach(), power_of_two)
    return torch.ops.deepseek_v3.quantize_activation_fp8(x.detach(), None, True, False, power_of_two)[:2]


def quantize_activation_fp8_transposed(
    x: torch.Tensor, offsets: torch.Tensor | None = None, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x [M, K]` in 128x1 tiles along M, transposed -> codes e4m3 `[K, M]`, scale fp32 `[K, ceil(M/128)]`.

    What a weight's gradient multiplies, for it sums over M. With `offsets` (int32 `[E+1]`, from 0 to M: where the rows
    of each expert begin and end) no tile holds rows of two experts: each expert begins a new tile, expert e the one
    numbered `offsets[e] // 128 + e`, and codes `[K, T*128]` and scale `[K, T]` have T = `M // 128 + E` tiles, with
    zeros where there is no row.
    """
    _check_activation(x, offsets)
    if not uses_triton(x):
        return reference.quantize_activation_transposed(x.detach(), offsets, power_of_two)
    codes, scale = torch.ops.deepseek_v3.quantize_activation_fp8(x.detach(), offsets, False, True, power_of_two)[2:]
    return codes if offsets is not None else codes[:, : x.shape[0]], scale


def quantize_weight_fp8(
    weight: torch.Tensor, transpose: bool = False, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight [N, K]` or `[E, N, K]` in 128x128 blocks, smaller at the edges, -> codes e4m3 and `scale_inv` fp32.

    Codes have the weight's shape, `scale_inv` is `[..., ceil(N/128), ceil(K/128)]`: the official checkpoints'
    `weight_scale_inv`, by which codes are multiplied. `transpose` returns both for the weight `[..., K, N]`, whose
    blocks are the same: what the gradient of the input multiplies.
    """
    if weight.ndim not in (2, 3) or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(f"weight is {_describe(weight)}; allowed: floating point [N, K] or [E, N, K], none of them 0")
    if not uses_triton(weight):
        return reference.quantize_weight(weight.detach(), transpose, power_of_two)
    return torch.ops.deepseek_v3.quantize_weight_fp8(weight.detach(), transpose, power_of_two)


def dequantize_weight_fp8(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """`weight * scale_inv` by 128x128 blocks, in fp32 and rounded to `dtype`; shapes of `quantize_weight_fp8`."""
    if weight.dtype != E4M3 or weight.ndim not in (2, 3) or 0 in weight.shape:
        raise ValueError(f"weight is {_describe(weight)}; allowed: {E4M3} [N, K] or [E, N, K], none of them 0")
    blocks = [*weight.shape[:-2], *(-(-size // reference.TILE) for size in weight.shape[-2:])]
    if list(scale_inv.shape) != blocks or scale_inv.dtype != torch.float32:
        raise ValueError(f"scale_inv is {_describe(scale_inv)}; a weight {list(weight.shape)} needs fp32 {blocks}")
    if not uses_triton(scale_inv):
        return reference.dequantize(weight, scale_inv, dtype)
    return torch.ops.deepseek_v3.dequantize_weight_fp8(weight, scale_inv, dtype)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_activation(x: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x is {_describe(x)}; allowed: floating point [M, K]")
    if offsets is not None:
        check_offsets(offsets)


@custom_op("deepseek_v3::quantize_activation_fp8")
def _quantize_activation(
    x: torch.Tensor, offsets: torch.Tensor | None, rowwise: bool, transposed: bool, power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import quantize_activation

    return quantize_activation(x, offsets, rowwise, transposed, power_of_two)


@_quantize_activation.register_fake
def _(x, offsets, rowwise, transposed, power_of_two):
    rows, columns = x.shape
    tiles = -(-rows // reference.TILE) if offsets is None else rows // reference.TILE + offsets.shape[0] - 1
    codes = x.new_empty((rows, columns) if rowwise else (0, 0), dtype=E4M3)
    scale = x.new_empty((-(-columns // reference.TILE), rows) if rowwise else (0, 0), dtype=torch.float32)
    codes_t = x.new_empty((columns, tiles * reference.TILE) if transposed else (0, 0), dtype=E4M3)
    scale_t = x.new_empty((tiles, columns) if transposed else (0, 0), dtype=torch.float32)
    return codes, scale.t(), codes_t, scale_t.t()


@custom_op("deepseek_v3::quantize_weight_fp8")
def _quantize_weight(weight: torch.Tensor, transpose: bool, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_impl import quantize_weight

    return quantize_weight(weight, transpose, power_of_two)


@_quantize_weight.register_fake
def _(weight, transpose, power_of_two):
    *matrices, rows, columns = weight.shape
    rows, columns = (columns, rows) if transpose else (rows, columns)
    scale = weight.new_empty(*matrices, -(-rows // reference.TILE), -(-columns // reference.TILE), dtype=torch.float32)
    return weight.new_empty(*matrices, rows, columns, dtype=E4M3), scale


@custom_op("deepseek_v3::dequantize_weight_fp8")
def _dequantize_weight(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .triton_impl import dequantize_weight

    return dequantize_weight(weight, scale_inv, dtype)


@_dequantize_weight.register_fake
def _(weight, scale_inv, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)
