"""Grouped matrix products over the slots of each expert, and the sums over a token's slots.

One program per tile of slots and block of columns, columns fastest: programs that run together share their rows and,
as tiles are sorted by expert, their expert's weights. Rows of `hidden` are read through `order`, so no permuted copy
of it is made. Rows past a tile's end repeat its last one and are not stored. Widths are compile-time constants: where
the blocks divide one, its mask vanishes. Only the length of the inner loop is passed as a number too, `inner`, or the
assembler would unroll all of it.
"""

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config
from .torch_impl import clear_tail
from .triton_permutation import Tiles, expert_tiles


@triton.jit
def _gate_up_kernel(
    hidden_ptr,  # [N, H]
    order_ptr,  # [slots] int32
    table_ptr,  # [3, tiles] int32
    gate_up_ptr,  # [E, 2I, H]
    out_ptr,  # [slots, I], silu(gate) * up; [slots, 2I], gate and up, if LINEAR
    tiles,
    inner,  # H
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    LINEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) // tl.cdiv(I, BLOCK_N)
    first = tl.load(table_ptr + tiles + tile)
    end = tl.load(table_ptr + 2 * tiles + tile)
    if first >= end:
        return
    expert = tl.load(table_ptr + tile).to(tl.int64)
    slot = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + tl.minimum(slot, end - 1)).to(tl.int64) // TOP_K
    column = (tl.program_id(0) % tl.cdiv(I, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = (column < I) | (I % BLOCK_N == 0)
    k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + token[:, None] * H + k[None, :]
    gate_ptrs = gate_up_ptr + expert * (2 * I * H) + column[None, :] * H + k[:, None]
    up_ptrs = gate_ptrs + I * H
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, inner, BLOCK_K):
        k_mask = (begin + k < H) | (H % BLOCK_K == 0)
        mask = k_mask[:, None] & column_mask[None, :]
        rows = tl.load(hidden_ptrs + begin, mask=k_mask[None, :], other=0.0)
        gate = tl.dot(rows, tl.load(gate_ptrs + begin, mask=mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(rows, tl.load(up_ptrs + begin, mask=mask, other=0.0), up, input_precision="ieee")
    mask = (slot < end)[:, None] & column_mask[None, :]
    row = tl.arange(0, BLOCK_M)[:, None]
    if LINEAR:
        out_ptrs = out_ptr + first.to(tl.int64) * (2 * I) + (row * (2 * I) + column[None, :])
        tl.store(out_ptrs, gate.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + I, up.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        out_ptrs = out_ptr + first.to(tl.int64) * I + (row * I + column[None, :])
        tl.store(out_ptrs, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(
    row_ptrs,  # [BLOCK_M, 1] pointers to the first element of rows of K
    weight_ptr,  # [N, K] or, if K_FIRST, [K, N]
    column,  # [BLOCK_N]
    inner,  # K
    N: tl.constexpr,
    K: tl.constexpr,
    K_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """-> `[BLOCK_M, BLOCK_N]` fp32: the rows times the weight's columns."""
    STRIDE_K: tl.constexpr = N if K_FIRST else 1
    STRIDE_N: tl.constexpr = 1 if K_FIRST else K
    column_mask = (column < N) | (N % BLOCK_N == 0)
    k = tl.arange(0, BLOCK_K)
    row_ptrs += k[None, :]
    weight_ptrs = weight_ptr + k[:, None] * STRIDE_K + column[None, :] * STRIDE_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, inner, BLOCK_K):
        k_mask = (begin + k < K) | (K % BLOCK_K == 0)
        rows = tl.load(row_ptrs + begin, mask=k_mask[None, :], other=0.0)
        weight = tl.load(weight_ptrs + begin * STRIDE_K, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(rows, weight, total, input_precision="ieee")
    return total


@triton.jit
def _grouped_product_kernel(
    rows_ptr,  # [slots, K]
    table_ptr,  # [3, tiles] int32
    weight_ptr,  # [E, N, K] or, if K_FIRST, [E, K, N]
    out_ptr,  # [slots, N]
    tiles,
    inner,  # K
    N: tl.constexpr,
    K: tl.constexpr,
    K_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) // tl.cdiv(N, BLOCK_N)
    first = tl.load(table_ptr + tiles + tile)
    end = tl.load(table_ptr + 2 * tiles + tile)
    if first >= end:
        return
    expert = tl.load(table_ptr + tile).to(tl.int64)
    row = tl.arange(0, BLOCK_M)[:, None]
    column = (tl.program_id(0) % tl.cdiv(N, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptrs = rows_ptr + first.to(tl.int64) * K + tl.minimum(row, end - first - 1) * K
    out = product(row_ptrs, weight_ptr + expert * (N * K), column, inner, N, K, K_FIRST, BLOCK_M, BLOCK_N, BLOCK_K)
    mask = (row < end - first) & ((column < N) | (N % BLOCK_N == 0))[None, :]
    out_ptrs = out_ptr + first.to(tl.int64) * N + (row * N + column[None, :])
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    rows_ptr,  # [slots, H]
    slots_ptr,  # [N, TOP_K] int32
    offsets_ptr,  # [E + 1] int32
    weights_ptr,  # [N, TOP_K]; read if WEIGHTED
    out_ptr,  # [N, H]
    tokens,
    num_experts,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    column_mask = (column < H) | (H % BLOCK == 0)
    computed = tl.load(offsets_ptr + num_experts)  # slots from here on are other ranks'
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + k, mask=token < tokens, other=2**31 - 1)
        ours = slot < computed
        row_ptrs = rows_ptr + slot.to(tl.int64)[:, None] * H + column
        row = tl.load(row_ptrs, mask=ours[:, None] & column_mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + token * TOP_K + k, mask=ours, other=0.0).to(tl.float32)[:, None]
        total += row
    mask = (token < tokens)[:, None] & column_mask
    tl.store(out_ptr + token[:, None] * H + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def tiles_for(hidden: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor) -> Tiles:
    """The tiles of all products over the slots, their height by the average number of rows per expert."""
    rows = bucket(triton.cdiv(order.shape[0], offsets.shape[0] - 1))
    config = kernel_config("experts_tiles", hidden.device, rows=rows, itemsize=hidden.element_size())
    return expert_tiles(offsets, order.shape[0], config["BLOCK_M"])


def gate_up_rows(
    hidden: torch.Tensor, gate_up: torch.Tensor, order: torch.Tensor, tiles: Tiles, top_k: int, linear: bool = False
) -> torch.Tensor:
    """-> `[slots, I]`, `silu(gate) * up` of each slot's token; with `linear`, `[slots, 2I]`, gate and up."""
    height, intermediate = tiles.table.shape[1], gate_up.shape[1] // 2
    out = hidden.new_empty(order.shape[0], 2 * intermediate if linear else intermediate)
    config = product_config("experts_gate_up", hidden, tiles)
    if height:
        _gate_up_kernel[(height * triton.cdiv(intermediate, config["BLOCK_N"]),)](
            hidden,
            order,
            tiles.table,
            gate_up,
            out,
            height,
            hidden.shape[1],
            TOP_K=top_k,
            H=hidden.shape[1],
            I=intermediate,
            LINEAR=linear,
            BLOCK_M=tiles.block_m,
            **config,
        )
    return out


def grouped_product(rows: torch.Tensor, weight: torch.Tensor, tiles: Tiles, k_first: bool = False) -> torch.Tensor:
    """`rows [slots, K]`, `weight [E, N, K]` (`[E, K, N]` if `k_first`) -> `[slots, N]`, each row by its expert's."""
    height, columns = tiles.table.shape[1], weight.shape[2 if k_first else 1]
    out = rows.new_empty(rows.shape[0], columns)
    config = product_config("experts_product", rows, tiles)
    if height:
        _grouped_product_kernel[(height * triton.cdiv(columns, config["BLOCK_N"]),)](
            rows,
            tiles.table,
            weight,
            out,
            height,
            rows.shape[1],
            N=columns,
            K=rows.shape[1],
            K_FIRST=k_first,
            BLOCK_M=tiles.block_m,
            **config,
        )
    return out


def grouped_rows_product(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, k_first: bool = False
) -> torch.Tensor:
    """`grouped_product` of rows that are sorted by expert as `offsets [E+1]` says, zeros past the last expert's."""
    tiles = tiles_for(rows, rows, offsets)
    return clear_tail(grouped_product(rows.contiguous(), weight, tiles, k_first), offsets[1:])


def combine(
    rows: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * rows[slots[t, k]]` in fp32 (weights of 1 without them), over our experts' slots.

    `rows [slots, H]`, `slots [N, K]`, `weights [N, K]` -> `[N, H]`.
    """
    tokens, width = slots.shape[0], rows.shape[1]
    out = rows.new_empty(tokens, width)
    config = kernel_config("experts_combine", rows.device)
    if tokens:
        _combine_kernel[(triton.cdiv(tokens, config["ROWS"]), triton.cdiv(width, config["BLOCK"]))](
            rows,
            slots,
            offsets,
            slots if weights is None else weights,
            out,
            tokens,
            offsets.shape[0] - 1,
            TOP_K=slots.shape[1],
            H=width,
            WEIGHTED=weights is not None,
            **config,
        )
    return out


def product_config(kernel: str, rows: torch.Tensor, tiles: Tiles) -> dict[str, int]:
    return kernel_config(kernel, rows.device, block_m=tiles.block_m, itemsize=rows.element_size())


def experts_forward(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """-> `[N, H]` in hidden's dtype. Arguments as in `grouped_swiglu_experts` and `permutation`."""
    hidden, weights, gate_up, down = (x.contiguous() for x in (hidden, weights, gate_up, down))
    tiles = tiles_for(hidden, order, offsets)
    activation = gate_up_rows(hidden, gate_up, order, tiles, slots.shape[1])
    return combine(grouped_product(activation, down, tiles), slots, offsets, weights)
