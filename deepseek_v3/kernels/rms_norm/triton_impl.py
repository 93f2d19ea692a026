"""RMSNorm kernels: one program per block of ROWS rows, the whole row in registers, sums in fp32.

The formula and the roundings are those of `reference.py`. Backward is persistent: each program walks over many blocks
and keeps its part of the weight's gradient in registers, so that gradient needs no atomics and is deterministic.
"""

import torch
import triton
import triton.language as tl

from ..configs import kernel_config, num_programs


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,  # [rows, columns], row stride x_stride
    residual_ptr,  # [rows, columns] contiguous; read if ADD
    weight_ptr,  # [columns]
    y_ptr,  # [rows, columns] contiguous
    total_ptr,  # [rows, columns] contiguous, x + residual; written if ADD
    scale_ptr,  # [rows] fp32, 1 / rms
    rows,
    x_stride,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    at = row * COLUMNS + column
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / COLUMNS + eps)
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    normed = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, (normed * weight).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,  # [rows, columns] contiguous, gradient of y
    grad_total_ptr,  # [rows, columns] contiguous, gradient of x + residual; read if ADD
    x_ptr,  # [rows, columns], row stride x_stride: what was normed
    weight_ptr,  # [columns]
    scale_ptr,  # [rows] fp32
    grad_x_ptr,  # [rows, columns] contiguous
    grad_weight_ptr,  # [programs, columns] fp32, one partial sum per program
    rows,
    x_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (row < rows) & (column < COLUMNS)
        at = row * COLUMNS + column
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        normed = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad_weight += grad * normed
        grad *= weight
        grad_x = (grad - normed * (tl.sum(grad * normed, axis=1, keep_dims=True) / COLUMNS)) * scale
        if ADD:
            grad_x += tl.load(grad_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * COLUMNS + column
    tl.store(grad_weight_ptr + at, tl.sum(grad_weight, axis=0, keep_dims=True), mask=column < COLUMNS)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[..., C]` as `[rows, C]` with adjacent columns; a view where the layout allows it (a slice of wider rows)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rms_norm_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> `y` like x, `x + residual` (empty without a residual) and `1 / rms` fp32 `[rows]`."""
    rows = _as_rows(x)
    columns = rows.shape[1]
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    config = kernel_config("rms_norm_forward", x.device, columns=columns)
    if rows.shape[0]:
        _rms_norm_forward_kernel[(triton.cdiv(rows.shape[0], config["ROWS"]),)](
            rows,
            x if residual is None else residual.contiguous(),
            weight,
            y,
            total,
            scale,
            rows.shape[0],
            rows.stride(0),
            eps,
            COLUMNS=columns,
            BLOCK=triton.next_power_of_2(columns),
            ADD=residual is not None,
            **config,
        )
    return y, total, scale


def rms_norm_backward(
    grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of x (that of `x + residual` added) and of the weight. `x` is what was normed."""
    rows = _as_rows(x)
    columns = rows.shape[1]
    config = kernel_config("rms_norm_backward", x.device, columns=columns)
    programs = max(1, min(num_programs(x.device), triton.cdiv(rows.shape[0], config["ROWS"])))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        grad.contiguous(),
        grad if grad_total is None else grad_total.contiguous(),
        rows,
        weight,
        scale,
        grad_x,
        grad_weight,
        rows.shape[0],
        rows.stride(0),
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        ADD=grad_total is not None,
        **config,
    )
    return grad_x, grad_weight.sum(0).to(weight.dtype)
