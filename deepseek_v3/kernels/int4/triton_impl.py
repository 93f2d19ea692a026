"""INT4 kernels: the linear layer, plain for few rows (split over the inputs where its grid is small) and grouped, and
dequantizing.

The product is computed transposed, `[out, rows]`: the weight fills the matrix units' 64 rows even where the layer has
one row of input. Integers are multiplied as they are, exactly, and a group's scale is applied to its sum in fp32.
"""

import math

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config, num_programs
from ..experts.triton_impl import expert_tiles, grouped_rows_product

MOST_ROWS = 256  # above it, dequantizing the weight for cuBLAS costs less than it gains
MIN_SPLIT_BLOCKS = 4  # a program takes at least so many blocks of inputs


@triton.jit
def _values(words, j: tl.constexpr):
    """Element j of each word, -8..7, in fp32. As the last bits of 2^23 = 0x4B000000, an integer n makes 2^23 + n:
    that costs less than a conversion."""
    return (((words >> 4 * j) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _unpack(words, dtype: tl.constexpr):
    """int32 words `[R, W]` -> their values -8..7 `[R, 8 W]`. A thread keeps the eight values of its words together."""
    even = tl.interleave(
        tl.interleave(_values(words, 0).to(dtype), _values(words, 4).to(dtype)),
        tl.interleave(_values(words, 2).to(dtype), _values(words, 6).to(dtype)),
    )
    odd = tl.interleave(
        tl.interleave(_values(words, 1).to(dtype), _values(words, 5).to(dtype)),
        tl.interleave(_values(words, 3).to(dtype), _values(words, 7).to(dtype)),
    )
    return tl.interleave(even, odd)


@triton.jit
def _int4_linear_kernel(
    x_ptr,  # [rows, in], row stride x_stride
    packed_ptr,  # [out, in / 8] int32, or [E, out, in / 8]
    scale_ptr,  # [out, in / GROUP], or [E, out, in / GROUP]
    table_ptr,  # [3, row_tiles] int32 as in `experts.triton_permutation.Tiles`; read if GROUPED
    y_ptr,  # [splits, rows, out]
    rows,
    row_tiles,
    outputs,
    x_stride,
    split_blocks,  # blocks of inputs per split
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP
):
    """Grid: blocks of rows by blocks of outputs, the latter fastest; splits of the inputs."""
    tile = tl.program_id(0) // tl.cdiv(outputs, BLOCK_N)
    split = tl.program_id(1)
    start, end = tile * BLOCK_M, rows
    if GROUPED:
        start, end = tl.load(table_ptr + row_tiles + tile), tl.load(table_ptr + 2 * row_tiles + tile)
        if start >= end:
            return
        expert = tl.load(table_ptr + tile).to(tl.int64)
        packed_ptr += expert * outputs * (INPUTS // 8)
        scale_ptr += expert * outputs * (INPUTS // GROUP)
    n = (tl.program_id(0) % tl.cdiv(outputs, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = start + tl.arange(0, BLOCK_M)
    word = tl.arange(0, BLOCK_K // 8)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * split_blocks
    for block in range(first, min(first + split_blocks, INPUTS // BLOCK_K)):
        words = tl.load(
            packed_ptr + n[:, None] * (INPUTS // 8) + (block * (BLOCK_K // 8) + word)[None, :],
            mask=n[:, None] < outputs,
            other=0,
        )
        scale = tl.load(scale_ptr + n * (INPUTS // GROUP) + block * BLOCK_K // GROUP, mask=n < outputs, other=0.0)
        x = tl.load(
            x_ptr + m[:, None].to(tl.int64) * x_stride + (block * BLOCK_K + k)[None, :],
            mask=m[:, None] < end,
            other=0.0,
        )
        total += tl.dot(_unpack(words, x.dtype), tl.trans(x), input_precision="ieee") * scale.to(tl.float32)[:, None]
    at = (split * rows + m)[:, None].to(tl.int64) * outputs + n[None, :]
    mask = (m[:, None] < end) & (n[None, :] < outputs)
    tl.store(y_ptr + at, tl.trans(total).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits_kernel(
    partial_ptr,  # [splits, size] fp32
    y_ptr,  # [size]
    splits,
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _dequantize_int4_kernel(
    packed_ptr,  # [size] int32
    scale_ptr,  # [size * 8 / GROUP]
    y_ptr,  # [size, 8]
    size,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows hold whole groups, so neither words nor scales need to know about rows."""
    at = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    words = tl.load(packed_ptr + at, mask=at < size, other=0)
    scale = tl.load(scale_ptr + at // (GROUP // 8), mask=at < size, other=0.0).to(tl.float32)
    values = _unpack(words, tl.float32) * scale
    tl.store(y_ptr + at * 8 + tl.arange(0, 8)[None, :], values.to(y_ptr.dtype.element_ty), mask=at < size)


def _group(packed: torch.Tensor, scale: torch.Tensor) -> int:
    return packed.shape[-1] * 8 // scale.shape[-1]


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`packed [..., in / 8]`, `scale [..., in / group]` -> `[..., in]`."""
    y = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8, dtype=dtype, device=packed.device)
    config = kernel_config("dequantize_int4", y.device)
    if y.numel():
        _dequantize_int4_kernel[(triton.cdiv(packed.numel(), config["BLOCK"]),)](
            packed.contiguous(), scale.contiguous(), y, packed.numel(), GROUP=_group(packed, scale), **config
        )
    return y


def int4_linear_forward(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x [rows, in]`, `packed [out, in / 8]`, `scale [out, in / group]` -> `[rows, out]` in x's dtype."""
    (rows, inputs), outputs = x.shape, packed.shape[0]
    y = x.new_empty(rows, outputs)
    if rows > MOST_ROWS or x.dtype == torch.float32:
        return torch.mm(x, dequantize_int4(packed, scale, x.dtype).t(), out=y)  # `out`: no autocast
    if not y.numel():
        return y
    group = _group(packed, scale)
    config = _dividing(kernel_config("int4_linear", x.device, rows=bucket(rows)), group)
    tiles = triton.cdiv(rows, config["BLOCK_M"])
    # The grid should fill the device; a second kernel adds the splits in order, so the result is always the same.
    programs, blocks = tiles * triton.cdiv(outputs, config["BLOCK_N"]), inputs // config["BLOCK_K"]
    splits = max(1, min(2 * num_programs(x.device) // programs, blocks // MIN_SPLIT_BLOCKS))
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    partial = y if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _launch(x, packed, scale, None, partial, tiles, split_blocks, config)
    if splits > 1:
        config = kernel_config("sum_splits", x.device)
        _sum_splits_kernel[(triton.cdiv(y.numel(), config["BLOCK"]),)](partial, y, splits, y.numel(), **config)
    return y


def int4_grouped_linear_forward(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """`x [M, in]`, `packed [E, out, in / 8]`, `scale [E, out, in / group]`, `offsets [E+1]` -> `[M, out]`."""
    y = x.new_zeros(x.shape[0], packed.shape[1])
    sizes = {"rows": bucket(x.shape[0] // packed.shape[0]), "itemsize": x.element_size()}
    config = _dividing(kernel_config("int4_grouped_linear", x.device, **sizes), _group(packed, scale))
    table = expert_tiles(offsets, x.shape[0], config["BLOCK_M"]).table
    if y.numel():
        _launch(x, packed, scale, table, y, table.shape[1], x.shape[1] // config["BLOCK_K"], config)
    return y


def int4_grouped_linear_backward(
    grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """`grad [M, out]` times the dequantized weights -> `[M, in]` in grad's dtype."""
    return grouped_rows_product(grad, dequantize_int4(packed, scale, grad.dtype), offsets, k_first=True)


def _dividing(config: dict[str, int], group: int) -> dict[str, int]:
    """With blocks of inputs that groups consist of."""
    return config | {"BLOCK_K": math.gcd(config["BLOCK_K"], group)}


def _launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor | None,
    y: torch.Tensor,
    tiles: int,
    split_blocks: int,
    config: dict[str, int],
) -> None:
    """`y [rows, out]`, or `[splits, rows, out]` with `split_blocks` blocks of inputs each."""
    outputs, inputs = packed.shape[-2], x.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    splits = triton.cdiv(inputs // config["BLOCK_K"], split_blocks)
    _int4_linear_kernel[(tiles * triton.cdiv(outputs, config["BLOCK_N"]), splits)](
        x,
        packed.contiguous(),
        scale.contiguous(),
        table,
        y,
        x.shape[0],
        tiles,
        outputs,
        x.stride(0),
        split_blocks,
        INPUTS=inputs,
        GROUP=_group(packed, scale),
        GROUPED=table is not None,
        **config,
    )
