"""Backward of the routed experts. With `g = dO_t`, `a = silu(gate) * up` and a choice's weight w:

    da = g @ down_e            dw = <da, a>                             so the down projection's output is not needed
    dup = w da silu(gate)      dgate = w da up silu'(gate)
    dx = sum_k dgate_up @ gate_up_e         dgate_up_e = dgate_up^T @ x     ddown_e = g^T @ (w a)

Gate and up are computed anew, then replaced in place by their gradients. The gradients of the weights are summed over
an expert's rows inside one program: no atomics, and an expert without rows gets exact zeros.
"""

import torch
import triton
import triton.language as tl

from ..configs import kernel_config
from .triton_forward import combine, gate_up_rows, grouped_product, product, product_config, tiles_for
from .triton_permutation import Tiles


@triton.jit
def _grad_activation_kernel(
    grad_ptr,  # [N, H], gradient of the output
    order_ptr,  # [slots] int32
    table_ptr,  # [3, tiles] int32
    down_ptr,  # [E, H, I]
    weights_ptr,  # [choices]
    gate_up_ptr,  # [slots, 2I], gate and up; becomes their gradient
    activation_ptr,  # [slots, I], silu(gate) * up times the choice's weight
    grad_weights_ptr,  # [blocks of I, choices] fp32, each block's part of the weights' gradient
    tiles,
    choices,
    inner,  # H
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) // tl.cdiv(I, BLOCK_N)
    block = tl.program_id(0) % tl.cdiv(I, BLOCK_N)
    first = tl.load(table_ptr + tiles + tile)
    end = tl.load(table_ptr + 2 * tiles + tile)
    if first >= end:
        return
    expert = tl.load(table_ptr + tile).to(tl.int64)
    slot = first + tl.arange(0, BLOCK_M)
    choice = tl.load(order_ptr + tl.minimum(slot, end - 1))
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptrs = grad_ptr + (choice // TOP_K).to(tl.int64)[:, None] * H
    grad = product(row_ptrs, down_ptr + expert * (H * I), column, inner, I, H, True, BLOCK_M, BLOCK_N, BLOCK_K)

    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    weight = tl.load(weights_ptr + choice).to(tl.float32)[:, None]
    row = tl.arange(0, BLOCK_M)[:, None]
    gate_up_ptr += first.to(tl.int64) * (2 * I) + block * BLOCK_N
    activation_ptr += first.to(tl.int64) * I + block * BLOCK_N
    grad_weight = tl.zeros((BLOCK_M,), tl.float32)
    # In two halves: with all of gate, up and their gradients at once, a 128 x 128 tile does not fit the registers.
    left, right = tl.split(tl.permute(tl.reshape(grad, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        column = half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
        grad = left if half == 0 else right
        mask = (row < end - first) & ((block * BLOCK_N + column < I) | (I % BLOCK_N == 0))
        gate_ptrs = gate_up_ptr + (row * (2 * I) + column)
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + I, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += tl.sum(grad * silu * up, axis=1)
        tl.debug_barrier()  # all threads have read gate and up
        tl.store(activation_ptr + (row * I + column), (weight * silu * up).to(dtype), mask=mask)
        grad *= weight
        tl.store(gate_ptrs, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=mask)
        tl.store(gate_ptrs + I, (grad * silu).to(dtype), mask=mask)
    tl.store(grad_weights_ptr + block.to(tl.int64) * choices + choice, grad_weight, mask=slot < end)


@triton.jit
def _grad_parameter_kernel(
    left_ptr,  # [slots, P]; [N, P] if GATHER_LEFT
    right_ptr,  # [slots, Q] if GATHER_LEFT; [N, Q]
    order_ptr,  # [slots] int32
    offsets_ptr,  # [E + 1] int32
    out_ptr,  # [E, P, Q], left^T @ right over the expert's slots
    TOP_K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    p = (tl.program_id(0) // tl.cdiv(Q, BLOCK_Q)) % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.program_id(0) % tl.cdiv(Q, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_mask = (p < P) | (P % BLOCK_P == 0)
    q_mask = (q < Q) | (Q % BLOCK_Q == 0)
    expert = tl.program_id(0) // (tl.cdiv(Q, BLOCK_Q) * tl.cdiv(P, BLOCK_P))
    end = tl.load(offsets_ptr + expert + 1)
    # The addresses of one side are loaded too: the pipeline is half as deep as num_stages says.
    total = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for first in range(tl.load(offsets_ptr + expert), end, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        inside = slot < end
        token = tl.load(order_ptr + slot, mask=inside, other=0) // TOP_K
        left_row = (token if GATHER_LEFT else slot).to(tl.int64)
        right_row = (slot if GATHER_LEFT else token).to(tl.int64)
        left_mask, right_mask = inside[None, :] & p_mask[:, None], inside[:, None] & q_mask[None, :]
        left = tl.load(left_ptr + left_row[None, :] * P + p[:, None], mask=left_mask, other=0.0)
        right = tl.load(right_ptr + right_row[:, None] * Q + q[None, :], mask=right_mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    out_ptrs = out_ptr + expert.to(tl.int64) * (P * Q) + p[:, None] * Q + q[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=p_mask[:, None] & q_mask[None, :])


def _grad_activation(
    grad: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    gate_up: torch.Tensor,
    order: torch.Tensor,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_up [slots, 2I]` becomes its gradient -> weighted activation `[slots, I]`, gradient of weights `[N, K]`."""
    height, (_, hidden, intermediate) = tiles.table.shape[1], down.shape
    config = product_config("experts_grad_activation", grad, tiles)
    blocks = triton.cdiv(intermediate, config["BLOCK_N"])
    activation = grad.new_empty(order.shape[0], intermediate)
    grad_weights = grad.new_zeros(blocks, *weights.shape, dtype=torch.float32)  # zeros for the choices of other ranks
    if height:
        _grad_activation_kernel[(height * blocks,)](
            grad,
            order,
            tiles.table,
            down,
            weights,
            gate_up,
            activation,
            grad_weights,
            height,
            order.shape[0],
            hidden,
            TOP_K=weights.shape[1],
            H=hidden,
            I=intermediate,
            BLOCK_M=tiles.block_m,
            **config,
        )
    return activation, grad_weights.sum(0).to(weights.dtype)


def _grad_parameter(
    left: torch.Tensor, right: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, top_k: int, gather_left: bool
) -> torch.Tensor:
    """-> `[E, P, Q]`: `left^T @ right` over each expert's slots; the side to gather holds tokens, the other slots."""
    experts, rows, columns = offsets.shape[0] - 1, left.shape[1], right.shape[1]
    out = left.new_empty(experts, rows, columns)
    config = kernel_config("experts_grad_parameter", left.device, itemsize=left.element_size())
    _grad_parameter_kernel[
        (experts * triton.cdiv(rows, config["BLOCK_P"]) * triton.cdiv(columns, config["BLOCK_Q"]),)
    ](left, right, order, offsets, out, TOP_K=top_k, P=rows, Q=columns, GATHER_LEFT=gather_left, **config)
    return out


def experts_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of hidden, weights, gate_up and down; the last two are empty if these are `frozen`."""
    grad, hidden, weights, gate_up, down = (x.contiguous() for x in (grad, hidden, weights, gate_up, down))
    top_k = slots.shape[1]
    tiles = tiles_for(hidden, order, offsets)
    rows = gate_up_rows(hidden, gate_up, order, tiles, top_k, linear=True)
    activation, grad_weights = _grad_activation(grad, weights, down, rows, order, tiles)
    if frozen:
        grad_gate_up, grad_down = gate_up.new_empty(0), down.new_empty(0)
    else:
        grad_down = _grad_parameter(grad, activation, order, offsets, top_k, gather_left=True)
        grad_gate_up = _grad_parameter(rows, hidden, order, offsets, top_k, gather_left=False)
    del activation  # as large as the products that follow
    grad_hidden = combine(grouped_product(rows, gate_up, tiles, k_first=True), slots, offsets)
    return grad_hidden, grad_weights, grad_gate_up, grad_down
