"""FP8 quantizers: one program per tile of rows x 128 columns, which reads it once and holds it in registers.

Codes and scales are those of `reference.py` bit for bit, so divisions are `div_rn`: Triton's `/` is approximate.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config
from .reference import TILE

_TILE = tl.constexpr(128)
_E4M3_MAX = tl.constexpr(448.0)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def expert_tile(offsets_ptr, tile, SIZE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """-> expert, first row and end of the expert's rows, of tile number `tile` of SIZE rows; first >= end if unused.

    Rows are sorted by expert, and the tiles of expert e begin at number `offsets[e] // SIZE + e`: room for all of
    them, in `rows // SIZE + EXPERTS` tiles, without a sum over the experts before.
    """
    e = tl.arange(0, BLOCK_E)
    first = tl.load(offsets_ptr + e, mask=e < EXPERTS, other=0) // SIZE + e
    expert = tl.sum(((first <= tile) & (e < EXPERTS)).to(tl.int32), axis=0) - 1
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    return expert, begin + (tile - begin // SIZE - expert) * SIZE, end


@triton.jit
def _scale_of(absmax, POWER_OF_TWO: tl.constexpr):
    """`absmax` is a `tl.max`, which passes over NaN."""
    scale = tl.div_rn(absmax, _E4M3_MAX)
    scale = tl.where(scale > _SMALLEST_SCALE, scale, _SMALLEST_SCALE)  # NaN if there is nothing but NaN
    if POWER_OF_TWO:  # up to the next one: the mantissa's bits carry into the exponent
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _quantize_activation_kernel(
    x_ptr,  # [rows, columns], row stride x_stride
    codes_ptr,  # [rows, columns] contiguous; written if ROWWISE
    scale_ptr,  # [column tiles, rows] contiguous; written if ROWWISE
    codes_t_ptr,  # [columns, row tiles * 128] contiguous; written if TRANSPOSED, with zeros where there is no row
    scale_t_ptr,  # [row tiles, columns] contiguous; written if TRANSPOSED
    offsets_ptr,  # [EXPERTS + 1] int32; read if EXPERTS
    rows,
    columns,
    x_stride,
    t_stride,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWWISE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,  # 128 if TRANSPOSED
):
    column_tile = tl.program_id(0) % tl.cdiv(columns, _TILE)
    row_tile = tl.program_id(0) // tl.cdiv(columns, _TILE)
    if EXPERTS:
        _, first, end = expert_tile(offsets_ptr, row_tile, BLOCK_M, EXPERTS, BLOCK_E)
    else:
        first, end = row_tile * BLOCK_M, rows
    row = first + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    column = column_tile * _TILE + tl.arange(0, _TILE)[None, :]
    mask = (row < end) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ROWWISE:
        scale = _scale_of(tl.max(tl.abs(x), axis=1, keep_dims=True), POWER_OF_TWO)
        codes = (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
        tl.store(codes_ptr + row * columns + column, codes, mask=mask)
        tl.store(scale_ptr + column_tile.to(tl.int64) * rows + row, scale, mask=row < end)
    if TRANSPOSED:
        scale = _scale_of(tl.max(tl.abs(x), axis=0, keep_dims=True), POWER_OF_TWO)
        codes = (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
        at = column.to(tl.int64) * t_stride + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        tl.store(codes_t_ptr + at, codes, mask=column < columns)
        tl.store(scale_t_ptr + row_tile.to(tl.int64) * columns + column, scale, mask=column < columns)


@triton.jit
def _quantize_weight_kernel(
    weight_ptr,  # [matrices, rows, columns] contiguous
    codes_ptr,  # the same, or [matrices, columns, rows] if TRANSPOSE
    scale_ptr,  # [matrices, row blocks, column blocks], or the last two swapped if TRANSPOSE
    rows,
    columns,
    TRANSPOSE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    row_block, column_block, matrix = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = row_block * _TILE + tl.arange(0, _TILE)[:, None].to(tl.int64)
    column = column_block * _TILE + tl.arange(0, _TILE)[None, :].to(tl.int64)
    mask = (row < rows) & (column < columns)
    base = matrix * rows * columns
    x = tl.load(weight_ptr + base + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.max(tl.abs(x), axis=1), axis=0), POWER_OF_TWO)
    codes = (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
    at = column * rows + row if TRANSPOSE else row * columns + column
    tl.store(codes_ptr + base + at, codes, mask=mask)
    row_blocks, column_blocks = tl.num_programs(1), tl.num_programs(0)
    block = column_block * row_blocks + row_block if TRANSPOSE else row_block * column_blocks + column_block
    tl.store(scale_ptr + matrix * row_blocks * column_blocks + block, scale)


@triton.jit
def _dequantize_weight_kernel(
    codes_ptr,  # [matrices, rows, columns] contiguous
    scale_ptr,  # [matrices, row blocks, column blocks] contiguous
    weight_ptr,  # like codes
    rows,
    columns,
):
    row_block, column_block, matrix = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = row_block * _TILE + tl.arange(0, _TILE)[:, None].to(tl.int64)
    column = column_block * _TILE + tl.arange(0, _TILE)[None, :]
    mask = (row < rows) & (column < columns)
    at = matrix * rows * columns + row * columns + column
    scale = tl.load(scale_ptr + (matrix * tl.num_programs(1) + row_block) * tl.num_programs(0) + column_block)
    x = tl.load(codes_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(weight_ptr + at, x.to(weight_ptr.dtype.element_ty), mask=mask)


@cache
def check_device(device: torch.device) -> None:
    """Raises on a GPU older than Ada and Hopper, for which e4m3 kernels do not compile."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise RuntimeError(
            f"FP8 kernels need a GPU of compute capability 8.9 or higher, {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}; with DEEPSEEK_V3_KERNELS=reference plain torch computes the same"
        )


def quantize_activation(
    x: torch.Tensor, offsets: torch.Tensor | None, rowwise: bool, transposed: bool, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> codes `[M, K]`, scale `[M, ...]`, and transposed: codes `[K, T*128]`, scale `[K, T]`; empty if not asked for.

    Transposed codes have whole tiles, with zeros at the end, so that their rows are aligned whatever M is. Scales are
    stored column by column, since a program writes, and a matrix product reads, one column at a time.
    """
    check_device(x.device)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    experts = offsets.shape[0] - 1 if transposed and offsets is not None else 0
    if transposed:
        config = {"BLOCK_M": TILE, **kernel_config("fp8_quantize_activation_transposed", x.device, columns=columns)}
    else:
        config = kernel_config("fp8_quantize_activation", x.device, rows=bucket(rows))
    row_tiles = rows // TILE + experts if experts else triton.cdiv(rows, config["BLOCK_M"])
    column_tiles = triton.cdiv(columns, TILE)

    def empty(wanted: bool, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape if wanted else (0, 0), dtype=dtype, device=x.device)

    codes = empty(rowwise, torch.float8_e4m3fn, rows, columns)
    scale = empty(rowwise, torch.float32, column_tiles, rows)
    codes_t = empty(transposed, torch.float8_e4m3fn, columns, row_tiles * TILE)
    scale_t = empty(transposed, torch.float32, row_tiles, columns)
    if row_tiles * column_tiles:
        _quantize_activation_kernel[(row_tiles * column_tiles,)](
            x,
            codes,
            scale,
            codes_t,
            scale_t,
            offsets if experts else scale,
            rows,
            columns,
            x.stride(0),
            row_tiles * TILE,
            EXPERTS=experts,
            BLOCK_E=triton.next_power_of_2(max(1, experts)),
            ROWWISE=rowwise,
            TRANSPOSED=transposed,
            POWER_OF_TWO=power_of_two,
            **config,
        )
    return codes, scale.t(), codes_t, scale_t.t()


def quantize_weight(
    weight: torch.Tensor, transpose: bool, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` or `[E, N, K]` -> codes and scale of 128x128 blocks, of `[..., K, N]` with `transpose`."""
    check_device(weight.device)
    *matrices, rows, columns = weight.shape
    grid = _blocks(weight)
    shape, scale_shape = (rows, columns), (grid[1], grid[0])
    if transpose:
        shape, scale_shape = shape[::-1], scale_shape[::-1]
    codes = torch.empty(*matrices, *shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(*matrices, *scale_shape, dtype=torch.float32, device=weight.device)
    config = kernel_config("fp8_quantize_weight", weight.device)
    _quantize_weight_kernel[grid](
        weight.contiguous(), codes, scale, rows, columns, TRANSPOSE=transpose, POWER_OF_TWO=power_of_two, **config
    )
    return codes, scale


def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    check_device(codes.device)
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    config = kernel_config("fp8_dequantize_weight", codes.device)
    _dequantize_weight_kernel[_blocks(codes)](
        codes.contiguous(), scale.contiguous(), weight, *codes.shape[-2:], **config
    )
    return weight


def _blocks(weight: torch.Tensor) -> tuple[int, int, int]:
    """The grid of the weight kernels: column blocks, row blocks, matrices."""
    rows, columns = weight.shape[-2:]
    return triton.cdiv(columns, TILE), triton.cdiv(rows, TILE), weight.shape[0] if weight.ndim == 3 else 1
