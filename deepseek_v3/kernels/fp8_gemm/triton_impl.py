"""FP8 matrix products: tensor cores add up 128 products along the contraction, fp32 registers the scaled sums.

One program per block of the output. Every step multiplies one tile of 128 of both operands; the result is scaled and
added in fp32 outside the tensor cores, whose FP8 accumulators keep about 14 bits (DeepSeek-V3, section 3.3.2).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..configs import bucket, kernel_config
from ..fp8_quant.reference import TILE
from ..fp8_quant.triton_impl import check_device, expert_tile, quantize_activation, quantize_weight

_TILE = tl.constexpr(128)


@triton.jit
def _fp8_gemm_kernel(
    a_ptr,  # [rows, inner], row stride a_stride
    a_scale_ptr,  # [rows, inner tiles], any strides
    b_ptr,  # [columns, inner] or [EXPERTS, columns, inner], row stride b_stride
    b_scale_ptr,  # [column blocks, inner tiles] if BLOCK_SCALES, else [columns, inner tiles]; or one per expert
    offsets_ptr,  # [EXPERTS + 1] int32; read if EXPERTS
    y_ptr,  # [rows, columns] contiguous
    rows,
    columns,
    inner,  # a multiple of 16, as are a_stride and b_stride
    a_stride,
    a_scale_row,
    a_scale_tile,
    b_stride,
    b_scale_row,
    b_scale_tile,
    row_tiles,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
    EVEN: tl.constexpr,  # inner is a multiple of 128
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at most 128
    GROUP_M: tl.constexpr,
):
    # GROUP_M row tiles by all column tiles at a time, so that neighbours share operands in the L2 cache
    group = tl.program_id(0) // (GROUP_M * tl.cdiv(columns, BLOCK_N))
    in_group = tl.program_id(0) % (GROUP_M * tl.cdiv(columns, BLOCK_N))
    group_size = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    row_tile = group * GROUP_M + in_group % group_size
    column_tile = in_group // group_size
    first, end = row_tile * BLOCK_M, rows
    if EXPERTS:
        expert, first, end = expert_tile(offsets_ptr, row_tile, BLOCK_M, EXPERTS, BLOCK_E)
        if first >= end:
            return
        b_ptr += expert.to(tl.int64) * columns * b_stride
        b_scale_ptr += expert.to(tl.int64) * tl.cdiv(columns, _TILE) * b_scale_row

    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_tile = tl.arange(0, _TILE)
    a_at = a_ptr + row[:, None] * a_stride + in_tile[None, :]
    b_at = b_ptr + column[None, :] * b_stride + in_tile[:, None]
    a_scale_at = a_scale_ptr + row * a_scale_row
    if BLOCK_SCALES:
        b_scale_at = b_scale_ptr + (column_tile * BLOCK_N // _TILE) * b_scale_row
    else:
        b_scale_at = b_scale_ptr + column * b_scale_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tl.cdiv(inner, _TILE)):
        left = _TILE if EVEN else inner - tile * _TILE
        a = tl.load(a_at, mask=(row[:, None] < end) & (in_tile[None, :] < left), other=0.0)
        b = tl.load(b_at, mask=(column[None, :] < columns) & (in_tile[:, None] < left), other=0.0)
        a_scale = tl.load(a_scale_at, mask=row < end, other=0.0)
        if BLOCK_SCALES:
            scale = (a_scale * tl.load(b_scale_at))[:, None]
        else:
            scale = a_scale[:, None] * tl.load(b_scale_at, mask=column < columns, other=0.0)[None, :]
        total += tl.dot(a, b, max_num_imprecise_acc=_TILE) * scale
        a_at += _TILE
        b_at += _TILE
        a_scale_at += a_scale_tile
        b_scale_at += b_scale_tile
    mask = (row[:, None] < end) & (column[None, :] < columns)
    tl.store(y_ptr + row[:, None] * columns + column[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fp8_grouped_wgrad_kernel(
    a_ptr,  # [rows, row tiles * 128] contiguous: the transposed gradient
    a_scale_ptr,  # [rows, row tiles], any strides
    b_ptr,  # [columns, row tiles * 128] contiguous: the transposed input
    b_scale_ptr,  # [columns, row tiles], any strides
    offsets_ptr,  # [experts + 1] int32
    y_ptr,  # [experts, rows, columns] contiguous
    rows,
    columns,
    stride,
    a_scale_row,
    a_scale_tile,
    b_scale_row,
    b_scale_tile,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    blocks = tl.cdiv(rows, BLOCK_M) * column_tiles
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    first = begin // _TILE + expert  # where the quantizer put the expert's tiles

    row = (block // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = (block % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    inner = first.to(tl.int64) * _TILE + tl.arange(0, _TILE)
    a_at = a_ptr + row[:, None] * stride + inner[None, :]
    b_at = b_ptr + column[None, :] * stride + inner[:, None]
    a_scale_at = a_scale_ptr + row * a_scale_row + first.to(tl.int64) * a_scale_tile
    b_scale_at = b_scale_ptr + column * b_scale_row + first.to(tl.int64) * b_scale_tile
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, tl.cdiv(end - begin, _TILE)):
        a = tl.load(a_at, mask=row[:, None] < rows, other=0.0)
        b = tl.load(b_at, mask=column[None, :] < columns, other=0.0)
        a_scale = tl.load(a_scale_at, mask=row < rows, other=0.0)
        b_scale = tl.load(b_scale_at, mask=column < columns, other=0.0)
        total += tl.dot(a, b, max_num_imprecise_acc=_TILE) * (a_scale[:, None] * b_scale[None, :])
        a_at += _TILE
        b_at += _TILE
        a_scale_at += a_scale_tile
        b_scale_at += b_scale_tile
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    at = (expert.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


def _aligned(codes: torch.Tensor) -> torch.Tensor:
    """Rows that begin and end at multiples of 16 bytes, the size of a load; a copy only for sizes no V3 layer has."""
    if codes.shape[-1] % 16 == 0 and codes.stride(-1) == 1 and codes.stride(-2) % 16 == 0:
        return codes
    return F.pad(codes.view(torch.uint8), (0, -codes.shape[-1] % 16)).contiguous().view(codes.dtype)


def gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    offsets: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`a [M, K] @ b [N, K].T`; with `offsets`, `b [E, N, K]` and each row times its expert's matrix."""
    check_device(a.device)
    rows, columns = a.shape[0], b.shape[-2]
    y = torch.empty(rows, columns, dtype=out_dtype, device=a.device)
    if y.numel() == 0:
        return y
    experts = 0 if offsets is None else offsets.shape[0] - 1
    a, b = _aligned(a), _aligned(b.contiguous() if experts else b)
    b_scale = b_scale.contiguous() if experts else b_scale
    block_scales = b_scale.shape[-2] != columns or columns == 1
    kernel = "fp8_gemm" if block_scales else "fp8_gemm_wgrad"
    config = kernel_config(kernel, a.device, rows=bucket(rows // max(1, experts)))
    row_tiles = rows // config["BLOCK_M"] + experts if experts else triton.cdiv(rows, config["BLOCK_M"])
    _fp8_gemm_kernel[(row_tiles * triton.cdiv(columns, config["BLOCK_N"]),)](
        a,
        a_scale,
        b,
        b_scale,
        offsets if experts else a_scale,
        y,
        rows,
        columns,
        a.shape[1],
        a.stride(0),
        *a_scale.stride(),
        b.stride(-2),
        *b_scale.stride()[-2:],
        row_tiles,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(max(1, experts)),
        BLOCK_SCALES=block_scales,
        EVEN=a.shape[1] % TILE == 0,
        **config,
    )
    return y


def grouped_wgrad(
    grad_t: torch.Tensor,
    grad_t_scale: torch.Tensor,
    x_t: torch.Tensor,
    x_t_scale: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`[N, T*128]` and `[K, T*128]`, tiles as the quantizer lays them out -> `[E, N, K]`, zeros without rows."""
    check_device(grad_t.device)
    experts, rows, columns = offsets.shape[0] - 1, grad_t.shape[0], x_t.shape[0]
    y = torch.empty(experts, rows, columns, dtype=out_dtype, device=grad_t.device)
    config = kernel_config("fp8_grouped_wgrad", grad_t.device)
    blocks = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    _fp8_grouped_wgrad_kernel[(experts * blocks,)](
        grad_t.contiguous(),
        grad_t_scale,
        x_t.contiguous(),
        x_t_scale,
        offsets,
        y,
        rows,
        columns,
        grad_t.shape[1],
        *grad_t_scale.stride(),
        *x_t_scale.stride(),
        **config,
    )
    return y


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> `y`, and what backward needs of x if `save`: its codes and scale for the weight's gradient."""
    codes, scale, codes_t, scale_t = quantize_activation(x, offsets, rowwise=True, transposed=save)
    return gemm(codes, scale, *quantize_weight(weight, transpose=False), offsets, x.dtype), codes_t, scale_t


def linear_backward(
    grad: torch.Tensor,
    x_t: torch.Tensor,
    x_t_scale: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of x and of the weight, empty where not needed."""
    grad_x, grad_weight = grad.new_empty(0), weight.new_empty(0)
    codes, scale, codes_t, scale_t = quantize_activation(grad, offsets, rowwise=needs_x, transposed=needs_weight)
    if needs_x:
        grad_x = gemm(codes, scale, *quantize_weight(weight, transpose=True), offsets, grad.dtype)
    if needs_weight and offsets is None:
        grad_weight = gemm(codes_t, scale_t, x_t, x_t_scale, None, weight.dtype)
    elif needs_weight:
        grad_weight = grouped_wgrad(codes_t, scale_t, x_t, x_t_scale, offsets, weight.dtype)
    return grad_x, grad_weight
