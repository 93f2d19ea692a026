"""The experts on torch's grouped matrix products: the fast path on CPUs, with the launchers' signatures.

Choices are laid out by expert in *rows*; on a CPU in bf16 each expert's rows are padded (see `_alignment`). A row of
padding reads the zero token and is read by nobody.
"""

import torch
import torch.nn.functional as F

from ..blocks import row_blocks
from ..dispatch import DTYPES


def fits(hidden: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether `grouped_mm` takes these: no fp64, rows that are a multiple of 16 bytes."""
    aligned = all(width * hidden.element_size() % 16 == 0 for width in down.shape[1:])
    return hidden.dtype in DTYPES and aligned


def is_one_token(hidden: torch.Tensor) -> bool:
    """Whether `one_token` serves: a decoding step on a CPU, outside of autograd and the compiler."""
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return hidden.shape[0] == 1 and hidden.device.type == "cpu" and eager


def one_token(
    hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Nothing to sort, and only the chosen experts' weights are read, as fast as memory gives them."""
    output = torch.zeros(hidden.shape[1], dtype=torch.float32)
    for expert, weight in zip(indices[0].tolist(), weights[0].tolist(), strict=True):
        if expert < gate_up.shape[0]:
            gate, up = torch.mv(gate_up[expert], hidden[0]).chunk(2)
            output.add_(torch.mv(down[expert], F.silu(gate) * up), alpha=weight)
    return output.to(hidden.dtype).unsqueeze(0)


def experts_forward(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the output `[N, H]` and the gate and up projections of every row `[R, 2I]`, for backward."""
    token_of, row_of, ends = expert_rows(hidden, order, slots, offsets)
    projected = _project(hidden, gate_up, token_of, ends)
    activated = weighted_swiglu(projected, weights_of_rows(weights, row_of, projected))
    output = F.grouped_mm(activated, down.transpose(1, 2), offs=ends)
    return gather_sum(clear_tail(output, ends), row_of), projected


def experts_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    projected: torch.Tensor,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of `hidden`, `weights`, `gate_up` and `down` (empty ones for the latter two if `frozen`).

    `projected` as forward returned it, or a 1-D tensor: then it is computed again.
    A weight's gradient is `<grad W_down, activation>` (arXiv 2512.14080), so the down projection is not kept.
    """
    token_of, row_of, ends = expert_rows(hidden, order, slots, offsets)
    if projected.dim() == 1:
        projected = _project(hidden, gate_up, token_of, ends)
    grad_rows = gather(grad, token_of)
    grad_activated = clear_tail(F.grouped_mm(grad_rows, down, offs=ends), ends)
    grad_projected, grad_row_weights, activated = weighted_swiglu_backward(
        projected, weights_of_rows(weights, row_of, projected), grad_activated
    )
    grad_hidden = gather_sum(clear_tail(F.grouped_mm(grad_projected, gate_up, offs=ends), ends), row_of)
    grad_weights = grad_row_weights.squeeze(1)[row_of].to(weights.dtype)
    if frozen:
        return grad_hidden, grad_weights, gate_up.new_empty(0), down.new_empty(0)
    grad_gate_up = F.grouped_mm(grad_projected.t(), gather(hidden, token_of), offs=ends)
    return grad_hidden, grad_weights, grad_gate_up, F.grouped_mm(grad_rows.t(), activated, offs=ends)


def weighted_swiglu(projected: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up * weight` of every row, in fp32 (fp64 if the input is): `[R, 2I]`, `[R, 1]` -> `[R, I]`."""
    activated = projected.new_empty(projected.shape[0], projected.shape[1] // 2)
    for projected_, weight_, activated_ in row_blocks(projected, row_weights, activated):
        gate, up = projected_.to(row_weights.dtype).chunk(2, dim=1)
        activated_.copy_(F.silu(gate).mul_(up).mul_(weight_))
    return activated


def weighted_swiglu_backward(
    projected: torch.Tensor, row_weights: torch.Tensor, grad_activated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of `projected [R, 2I]` and `row_weights [R, 1]`, and `weighted_swiglu` itself once more."""
    grad_row_weights = torch.empty_like(row_weights)
    grad_projected, activated = torch.empty_like(projected), torch.empty_like(grad_activated)
    blocks = row_blocks(projected, row_weights, grad_activated, grad_row_weights, grad_projected, activated)
    for projected_, weight_, grad_activated_, grad_weight_, grad_projected_, activated_ in blocks:
        gate, up = projected_.to(row_weights.dtype).chunk(2, dim=1)
        grad_ = grad_activated_.to(row_weights.dtype)
        silu = F.silu(gate)
        grad_silu = grad_ * up
        torch.sum(grad_silu * silu, dim=1, keepdim=True, out=grad_weight_)
        grad_gate, grad_up = grad_projected_.chunk(2, dim=1)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_silu.mul_(weight_), gate))
        silu.mul_(weight_)
        grad_up.copy_(grad_.mul_(silu))
        activated_.copy_(silu.mul_(up))
    return grad_projected, grad_row_weights, activated


def _project(hidden: torch.Tensor, gate_up: torch.Tensor, token_of: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Gate and up of every row, `[R, 2I]`."""
    return clear_tail(F.grouped_mm(gather(hidden, token_of), gate_up.transpose(1, 2), offs=ends), ends)


def _alignment(hidden: torch.Tensor, choices: int, num_experts: int) -> int:
    """Each expert's rows are padded to a multiple of this. oneDNN builds a bf16 kernel per matrix shape, and every
    expert's token count is a new shape: rounding up to 64 makes shapes repeat (3x faster forward and backward)."""
    bf16_on_cpu = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16
    return 64 if bf16_on_cpu and choices >= 32 * num_experts else 1


def expert_rows(
    hidden: torch.Tensor, order: torch.Tensor, slots: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the slots without padding: `token_of [R]` (N for padding), `row_of [N, K]` and `ends [E]` int32."""
    num_tokens, top_k = slots.shape
    num_experts = offsets.shape[0] - 1
    align = _alignment(hidden, slots.numel(), num_experts)
    if align == 1:
        return order // top_k, slots, offsets[1:]
    padded = (offsets.diff() + align - 1) // align * align
    ends = padded.cumsum(0)
    shift = torch.cat((ends - padded - offsets[:-1], (ends - offsets[1:])[-1:]))  # the last one for choices of value E
    expert = torch.searchsorted(offsets[1:], torch.arange(slots.numel(), dtype=torch.int32), right=True)
    rows = torch.arange(slots.numel()) + shift[expert]
    token_of = torch.full((slots.numel() + int(shift[-1]),), num_tokens).index_copy_(0, rows, (order // top_k).long())
    return token_of, rows[slots.long()], ends.to(torch.int32)


def weights_of_rows(weights: torch.Tensor, row_of: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """`[N, K]` -> `[R, 1]`, zero for padding; fp32, or fp64 where `projected` is."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    rows = weights.new_zeros(projected.shape[0], dtype=dtype)
    return rows.index_copy_(0, row_of.flatten().long(), weights.flatten().to(dtype))[:, None]


def gather(x: torch.Tensor, token_of: torch.Tensor) -> torch.Tensor:
    """The token `[N, ...]` of every row, zeros for padding."""
    return torch.cat((x, x.new_zeros(1, x.shape[1]))).index_select(0, token_of)


def gather_sum(rows: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
    """`out[t] = sum_k rows[row_of[t, k]]`, added in fp32."""
    return F.embedding_bag(row_of, rows, mode="sum")


def clear_tail(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Zero the rows past the last expert's: `grouped_mm` does not compute them and leaves their memory as it was."""
    if rows.device.type == "cpu":
        rows[int(ends[-1]) :] = 0
        return rows
    past = torch.arange(len(rows), device=rows.device) >= ends[-1]  # without waiting for the device
    return rows.masked_fill_(past[:, None], 0)
