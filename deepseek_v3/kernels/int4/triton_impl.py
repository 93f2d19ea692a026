"""INT4 kernels: the linear layer for few rows, split over the inputs where its grid is small, and dequantizing.

The product is computed transposed, `[out, rows]`: the weight fills the matrix units' 64 rows even where the layer has
one row of input. Integers are multiplied as they are, exactly, and a group's scale is applied to its sum in fp32.
"""

import math

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config, num_programs

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
    packed_ptr,  # [out, in / 8] int32
    scale_ptr,  # [out, in / GROUP]
    y_ptr,  # [splits, rows, out]
    rows,
    outputs,
    x_stride,
    split_blocks,  # blocks of inputs per split
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP
):
    """Grid: blocks of outputs, blocks of rows, splits of the inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
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
            mask=m[:, None] < rows,
            other=0.0,
        )
        total += tl.dot(_unpack(words, x.dtype), tl.trans(x)) * scale.to(tl.float32)[:, None]
    at = (split * rows + m)[:, None] * outputs + n[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < outputs)
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
    x = x if x.stride(1) == 1 else x.contiguous()
    group = _group(packed, scale)
    config = dict(kernel_config("int4_linear", x.device, rows=bucket(rows)))
    config["BLOCK_K"] = math.gcd(config["BLOCK_K"], group)
    grid = triton.cdiv(outputs, config["BLOCK_N"]), triton.cdiv(rows, config["BLOCK_M"])
    # The grid should fill the device; a second kernel adds the splits in order, so the result is always the same.
    blocks = inputs // config["BLOCK_K"]
    splits = max(1, min(2 * num_programs(x.device) // (grid[0] * grid[1]), blocks // MIN_SPLIT_BLOCKS))
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    partial = y if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _int4_linear_kernel[(*grid, splits)](
        x,
        packed.contiguous(),
        scale.contiguous(),
        partial,
        rows,
        outputs,
        x.stride(0),
        split_blocks,
        INPUTS=inputs,
        GROUP=group,
        **config,
    )
    if splits > 1:
        config = kernel_config("sum_splits", x.device)
        _sum_splits_kernel[(triton.cdiv(y.numel(), config["BLOCK"]),)](partial, y, splits, y.numel(), **config)
    return y
