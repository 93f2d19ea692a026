"""FP8 (e4m3) with fine-grained scales in plain torch: 1x128 tiles of activations, 128x128 blocks of weights.

Everything is computed in fp32: `scale = max(absmax / 448, 2^-126)` and `codes = x * (1 / scale)` rounded to nearest
even. The lower bound, the smallest normal number, keeps a tile of zeros from dividing by zero, and no scale is ever
denormal. `codes * scale` is the value again, so a tile of zeros stays exactly zero.
"""

import torch
import torch.nn.functional as F

TILE = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126


def quantize_activation(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, 1, TILE, power_of_two)


def quantize_activation_transposed(
    x: torch.Tensor, offsets: torch.Tensor | None, power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.T if offsets is None else pad_experts(x, offsets).T
    return _quantize(columns, 1, TILE, power_of_two)


def quantize_weight(weight: torch.Tensor, transpose: bool, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(weight.mT if transpose else weight, TILE, TILE, power_of_two)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[..., R, C]` of 1x128 tiles (scale `[..., R, ceil(C/128)]`) or 128x128 blocks (`[..., ceil(R/128), ...]`)."""
    rows = 1 if scale.shape[-2] == codes.shape[-2] else TILE
    return (codes.float() * spread_scales(scale, codes.shape, rows, TILE)).to(dtype)


def pad_experts(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows `[M, K]` sorted by expert -> `[(M // 128 + E) * 128, K]`: each expert begins a new tile of 128 rows.

    The tiles of expert e are those from `offsets[e] // 128 + e`. That leaves room for all of them whatever the counts
    are, and the size is known without reading `offsets`; the rows between are zero.
    """
    bounds = offsets.tolist()
    padded = x.new_zeros((x.shape[0] // TILE + len(bounds) - 1) * TILE, x.shape[1])
    for expert, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        first = (begin // TILE + expert) * TILE
        padded[first : first + end - begin] = x[begin:end]
    return padded


def _quantize(x: torch.Tensor, rows: int, columns: int, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    magnitude = F.pad(x.abs().masked_fill(x.isnan(), 0), (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    absmax = magnitude.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
    # the divisor is a tensor because on CUDA torch multiplies by the rounded reciprocal of a number
    scale = (absmax / torch.full_like(absmax, E4M3_MAX)).clamp_min(SMALLEST_SCALE)
    if power_of_two:  # up to the next one: the mantissa's bits carry into the exponent
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (x * spread_scales(1 / scale, x.shape, rows, columns)).to(torch.float8_e4m3fn).contiguous(), scale


def spread_scales(scale: torch.Tensor, shape: torch.Size, rows: int, columns: int) -> torch.Tensor:
    """One factor per tile of `rows x columns`, smaller at the edges -> one per element of `shape`."""
    scale = scale.repeat_interleave(rows, -2)[..., : shape[-2], :]
    return scale.repeat_interleave(columns, -1)[..., : shape[-1]]
