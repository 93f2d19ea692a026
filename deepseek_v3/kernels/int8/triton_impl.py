"""INT8 kernels: the quantizer of activations, and the product, plain and grouped, with int32 accumulators.

Integers are multiplied and summed exactly, so neither blocks nor their order change a result.
"""

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config
from ..experts.triton_impl import expert_tiles, grouped_rows_product
from .reference import dequantize_int8


@triton.jit
def _quantize_activation_int8_kernel(
    x_ptr,  # [rows, columns], row stride x_stride
    codes_ptr,  # [rows, columns]
    scale_ptr,  # [rows] fp32
    x_stride,
    columns,
    BLOCK: tl.constexpr,
):
    """Grid: rows. The row is read twice, the second time from a cache."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    nan = tl.zeros((BLOCK,), tl.int32)  # `tl.maximum` passes over NaN
    for first in range(0, columns, BLOCK):
        x = tl.load(x_ptr + row * x_stride + first + at, mask=first + at < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        nan |= (x != x).to(tl.int32)
    scale = tl.div_rn(tl.max(largest, axis=0), 127.0)
    scale = tl.where(scale > 2.0**-126, scale, 2.0**-126)
    scale = tl.where(tl.max(nan, axis=0) > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    for first in range(0, columns, BLOCK):
        mask = first + at < columns
        x = tl.load(x_ptr + row * x_stride + first + at, mask=mask, other=0.0).to(tl.float32)
        # 1.5 * 2^23 rounds to an integer, to nearest even, which is then in the last bits
        codes = (tl.div_rn(x, tl.full((BLOCK,), 0.0, tl.float32) + scale) + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(codes_ptr + row * columns + first + at, codes.to(tl.int8), mask=mask)


@triton.jit
def _int8_linear_kernel(
    x_ptr,  # [rows, K] int8
    x_scale_ptr,  # [rows] fp32
    codes_ptr,  # [N, K] int8, or [E, N, K]
    scale_ptr,  # [N], or [E, N]
    table_ptr,  # [3, row_tiles] int32 as in `experts.triton_permutation.Tiles`; read if GROUPED
    y_ptr,  # [rows, N]
    rows,
    row_tiles,
    inner,  # K
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # GROUP_M row tiles by all column tiles at a time, so that neighbours share operands in the L2 cache
    column_tiles = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * column_tiles)
    in_group = tl.program_id(0) % (GROUP_M * column_tiles)
    group_size = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + in_group % group_size
    first, end = tile * BLOCK_M, rows
    if GROUPED:
        first, end = tl.load(table_ptr + row_tiles + tile), tl.load(table_ptr + 2 * row_tiles + tile)
        if first >= end:
            return
        expert = tl.load(table_ptr + tile).to(tl.int64)
        codes_ptr += expert * (N * K)
        scale_ptr += expert * N
    row = first + tl.arange(0, BLOCK_M)
    row_mask = row < end
    column = (in_group // group_size) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = (column < N) | (N % BLOCK_N == 0)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    codes_ptrs = codes_ptr + column[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for begin in range(0, inner, BLOCK_K):
        k_mask = (begin + k < K) | (K % BLOCK_K == 0)
        x = tl.load(x_ptrs + begin, mask=row_mask[:, None] & k_mask[None, :], other=0)
        codes = tl.load(codes_ptrs + begin, mask=k_mask[:, None] & column_mask[None, :], other=0)
        total = tl.dot(x, codes, total, out_dtype=tl.int32)
    scale = tl.load(scale_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    x_scale = tl.load(x_scale_ptr + row, mask=row_mask, other=0.0)
    y = total.to(tl.float32) * scale[None, :] * x_scale[:, None]
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def quantize_activation_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x [M, K]` -> codes `[M, K]` int8, scale `[M, 1]` fp32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    config = kernel_config("quantize_activation_int8", x.device)
    if x.shape[0]:
        _quantize_activation_int8_kernel[(x.shape[0],)](x, codes, scale, x.stride(0), x.shape[1], **config)
    return codes, scale


def int8_linear_forward(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    """`x [M, K]`, `codes [N, K]` -> `[M, N]` in x's dtype; with `offsets`, `codes [E, N, K]` and each row times its
    expert's."""
    (rows, inner), outputs = x.shape, codes.shape[-2]
    if offsets is None:
        y = x.new_empty(rows, outputs)
        config, table = kernel_config("int8_linear", x.device, rows=bucket(rows)), None
        row_tiles = triton.cdiv(rows, config["BLOCK_M"])
    else:
        y = x.new_zeros(rows, outputs)
        config = kernel_config("int8_linear", x.device, rows=bucket(rows // codes.shape[0]))
        table = expert_tiles(offsets, rows, config["BLOCK_M"]).table
        row_tiles = table.shape[1]
    x_codes, x_scale = quantize_activation_int8(x)
    if y.numel():
        _int8_linear_kernel[(row_tiles * triton.cdiv(outputs, config["BLOCK_N"]),)](
            x_codes,
            x_scale,
            codes.contiguous(),
            scale.contiguous(),
            table,
            y,
            rows,
            row_tiles,
            inner,
            N=outputs,
            K=inner,
            GROUPED=offsets is not None,
            **config,
        )
    return y


def int8_linear_backward(
    grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    """`grad [M, N]` times the dequantized weight -> `[M, K]` in grad's dtype."""
    weight = dequantize_int8(codes, scale, grad.dtype)
    if offsets is None:
        return torch.mm(grad, weight)
    return grouped_rows_product(grad, weight, offsets, k_first=True)
