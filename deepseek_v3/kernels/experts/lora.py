"""The routed experts with frozen weights and low-rank adapters on the activations.

An adapter's product `B_e A_e` has the size of the experts' weights and is never formed: rows pass through `A_e` and
`B_e` beside the base weight, so that time and memory grow with the rank. No gradient of a base weight exists.

Shape legend: N tokens, E experts, K chosen per token, H hidden, I expert's intermediate size, r rank, R rows: the
choices laid out by expert (see `torch_impl`).
"""

from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..dispatch import DTYPES
from . import check_dtype, check_shapes, permutation
from .torch_impl import (
    clear_tail,
    expert_rows,
    gather,
    gather_sum,
    is_one_token,
    weighted_swiglu,
    weighted_swiglu_backward,
    weights_of_rows,
)

Factors = tuple[torch.Tensor, torch.Tensor] | None  # A [E, r, in], B [E, out, r]


class QuantizedWeight(Protocol):
    """What stands for a base weight that is stored in fewer bits."""

    shape: torch.Size
    device: torch.device

    def dequantize(self, dtype: torch.dtype, experts: torch.Tensor | None = None) -> torch.Tensor:
        """The weight itself `[E, out, in]`, newly made, or the chosen `experts [n]` of it."""

    def __getitem__(self, expert: int) -> torch.Tensor:
        """One expert's matrix `[out, in]`, in any floating-point dtype."""


class MultipliedWeight(QuantizedWeight, Protocol):
    """One that is multiplied as it is stored: forward does not dequantize it."""

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """`x [M, in]` sorted by expert -> `[M, out]` in x's dtype, called without autograd. Expert e has the rows from
        `offsets[e]` to `offsets[e+1]` (int32 `[E+1]`); rows from `offsets[E]` on become zeros."""


def is_quantized(weight: object) -> bool:
    """Whether a weight brings its own `dequantize`; torch gives every tensor a method of that name."""
    return getattr(type(weight), "dequantize", torch.Tensor.dequantize) is not torch.Tensor.dequantize


def _is_multiplied(weight: object) -> TypeGuard[MultipliedWeight]:
    return is_quantized(weight) and hasattr(weight, "grouped_linear")


def _is_dequantized(weight: object) -> bool:
    return is_quantized(weight) and not _is_multiplied(weight)


def grouped_lora_experts(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: "torch.Tensor | QuantizedWeight",
    down: "torch.Tensor | QuantizedWeight",
    lora_gate_up: Factors,
    lora_down: Factors,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`grouped_swiglu_experts` with each base weight `W_e` replaced by `W_e + B_e A_e`.

    `hidden [N, H]`, `indices [N, K]` int64 in [0, E] (E: another rank computes it), `weights [N, K]` fp32,
    `gate_up [E, 2I, H]`, `down [E, H, I]` -> `[N, H]` in the dtype of `hidden`, which is that of all tensors but
    `weights`. `lora_gate_up` and `lora_down` are None or `(A [E, r, in], B [E, out, r])`, the scaling folded into B.
    `dropout` is the probability that an element of the input of A is zero; its mask is drawn per token for gate and
    up, and per row for down.

    Differentiable in `hidden`, `weights` and the factors. Backward keeps `hidden`, `weights`, the order of the
    choices, the factors and the dropout masks, and on a CPU the gate and up projections; everything else is computed
    anew. A quantized base weight is dequantized for each product and kept for none, one of the two at a time; one with
    a `grouped_linear` is dequantized for backward only.

    Products are `torch.nn.functional.grouped_mm`. CPUs, fp64 and rows that are no multiple of 16 bytes take one
    product per expert, which on a CPU is what `grouped_mm` does too, but adds the adapter's share in place. The path
    with `grouped_mm` has been run on CPU tensors only, not yet on a GPU.
    """
    check_shapes(hidden, indices, weights, gate_up, down)
    _check_weight("gate_up", gate_up, lora_gate_up, hidden)
    _check_weight("down", down, lora_down, hidden)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; allowed: 0 <= dropout < 1")
    one_token = is_one_token(hidden) and not dropout
    if not torch.is_grad_enabled() and not one_token and _is_dequantized(gate_up) and _is_dequantized(down):
        used, indices = indices.unique(return_inverse=True)  # in decoding only a few experts are; E sorts last
        used = used[used < gate_up.shape[0]]
        gate_up, down = _Chosen(gate_up, used), _Chosen(down, used)
        lora_gate_up, lora_down = (
            None if pair is None else (pair[0][used], pair[1][used]) for pair in (lora_gate_up, lora_down)
        )
        if not len(used):
            return torch.zeros_like(hidden)
    if one_token:
        return _one_token(hidden, indices, weights, gate_up, down, lora_gate_up, lora_down)
    grouped = _takes_grouped_mm(hidden.device, hidden.dtype, *down.shape[1:])
    factors = [
        _prepared(factor, is_b, dropout, grouped)
        for pair in (lora_gate_up, lora_down)
        for is_b, factor in enumerate(pair or (None, None))
    ]
    return _Experts.apply(hidden, weights, *factors, gate_up, down, permutation(indices, gate_up.shape[0]), dropout)


class _Chosen:
    """Some experts of a quantized weight; the others are not dequantized."""

    def __init__(self, weight: QuantizedWeight, experts: torch.Tensor) -> None:
        self.weight, self.experts, self.device = weight, experts, weight.device
        self.shape = torch.Size((len(experts), *weight.shape[1:]))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.dequantize(dtype, self.experts)


def _check_weight(name: str, weight: Any, factors: Factors, hidden: torch.Tensor) -> None:
    if not is_quantized(weight):
        check_dtype(name, weight, hidden)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient; allowed: a frozen weight")
    if factors is None:
        return
    experts, out, width = weight.shape
    rank = factors[0].shape[1]
    for factor, tensor, allowed in (
        ("A", factors[0], [experts, rank, width]),
        ("B", factors[1], [experts, out, rank]),
    ):
        check_dtype(f"{factor} of lora_{name}", tensor, hidden)
        if list(tensor.shape) != allowed:
            raise ValueError(f"{factor} of lora_{name} has shape {list(tensor.shape)}; allowed: {allowed}")


def _one_token(hidden, indices, weights, gate_up, down, lora_gate_up, lora_down) -> torch.Tensor:
    """As `torch_impl.one_token`: a row for each chosen expert, sorted by expert."""
    experts, order = indices[0].sort()
    offsets = torch.searchsorted(experts, torch.arange(gate_up.shape[0] + 1), out_int32=True)
    chosen = experts[: int(offsets[-1])].tolist()
    if not chosen:
        return torch.zeros_like(hidden)

    def product(weight, factors: Factors, rows: torch.Tensor) -> torch.Tensor:
        if _is_multiplied(weight):
            output = weight.grouped_linear(rows, offsets)
        else:
            matrices = (weight[expert].to(rows.dtype) for expert in chosen)
            output = torch.stack([torch.mv(matrix, row) for matrix, row in zip(matrices, rows, strict=True)])
        if factors is not None:
            for expert, row, output_ in zip(chosen, rows, output, strict=True):
                output_.addmv_(factors[1][expert], torch.mv(factors[0][expert], row))
        return output

    gate, up = product(gate_up, lora_gate_up, hidden.expand(len(chosen), -1)).chunk(2, dim=1)
    output = product(down, lora_down, F.silu(gate) * up).to(torch.promote_types(hidden.dtype, torch.float32))
    output.mul_(weights[0][order[: len(chosen)], None])
    return output.sum(0, keepdim=True).to(hidden.dtype)


def _prepared(factor: torch.Tensor | None, is_b: int, dropout: float, grouped: bool) -> torch.Tensor | None:
    """Contiguous, with a rank that `grouped_mm` takes, and what dropout keeps scaled up by way of B."""
    if factor is None:
        return None
    if is_b and dropout:
        factor = factor / (1 - dropout)
    if grouped:
        missing = -factor.shape[2 if is_b else 1] % (16 // factor.element_size())
        factor = F.pad(factor, (0, missing) if is_b else (0, 0, 0, missing))
    return factor.contiguous()


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weights, gate_up_a, gate_up_b, down_a, down_b, gate_up, down, sorted_choices, dropout):
        token_of, row_of, ends = expert_rows(hidden, *sorted_choices)
        token_mask = _mask(hidden, dropout) if gate_up_a is not None else None
        projected = _project(hidden, token_mask, gate_up_a, gate_up_b, gate_up, token_of, ends)
        activated = weighted_swiglu(projected, weights_of_rows(weights, row_of, projected))
        if not _keeps_projections(hidden.device):
            projected = None
        row_mask = _mask(activated, dropout) if down_a is not None else None
        output = _base_product(activated, down, ends)
        if down_a is not None:
            _expand(_reduce(_masked_(activated, row_mask), down_a, ends), down_b.mT, ends, add_to=output)
        ctx.base = gate_up, down
        factors = gate_up_a, gate_up_b, down_a, down_b
        ctx.save_for_backward(hidden, weights, *factors, *sorted_choices, token_mask, row_mask, projected)
        return gather_sum(output, row_of)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weights, gate_up_a, gate_up_b, down_a, down_b, *kept = ctx.saved_tensors
        order, slots, offsets, token_mask, row_mask, projected = kept
        del kept
        gate_up, down = ctx.base
        token_of, row_of, ends = expert_rows(hidden, order, slots, offsets)
        grads = [None] * 6

        if projected is None:
            projected = _project(hidden, token_mask, gate_up_a, gate_up_b, gate_up, token_of, ends)
        grad_rows = gather(grad, token_of)
        grad_activated = _product(grad_rows, _dense(down, hidden.dtype), ends)
        if down_a is not None:
            inner = _reduce(grad_rows, down_b.mT, ends)
            if row_mask is None:
                _expand(inner, down_a, ends, add_to=grad_activated)
            else:
                grad_activated += _masked_(_expand(inner, down_a, ends), row_mask)
        row_weights = weights_of_rows(weights, row_of, projected)
        grad_projected, grad_row_weights, activated = weighted_swiglu_backward(projected, row_weights, grad_activated)
        del projected, grad_activated
        grads[1] = grad_row_weights.squeeze(1)[row_of].to(weights.dtype)
        if down_a is not None:
            activated = _masked_(activated, row_mask)
            grads[4] = _factor_grad(inner, activated, down_a, ends)
            grads[5] = _factor_grad(_reduce(activated, down_a, ends), grad_rows, down_b.mT, ends).mT
        del grad_rows, activated

        if gate_up_a is not None:
            inner = _reduce(grad_projected, gate_up_b.mT, ends)
            rows = _gather_masked(hidden, token_mask, token_of)
            grads[2] = _factor_grad(inner, rows, gate_up_a, ends)
            grads[3] = _factor_grad(_reduce(rows, gate_up_a, ends), grad_projected, gate_up_b.mT, ends).mT
            del rows
        if ctx.needs_input_grad[0]:
            grad_rows = _product(grad_projected, _dense(gate_up, hidden.dtype), ends)
            del grad_projected
            if gate_up_a is not None and token_mask is None:
                _expand(inner, gate_up_a, ends, add_to=grad_rows)
            grads[0] = gather_sum(grad_rows, row_of)
            if gate_up_a is not None and token_mask is not None:
                del grad_rows
                grads[0] += _masked_(gather_sum(_expand(inner, gate_up_a, ends), row_of), token_mask)
        return *grads, None, None, None, None


def _project(hidden, token_mask, a, b, gate_up, token_of, ends) -> torch.Tensor:
    """Gate and up of every row, `[R, 2I]`."""
    rows = gather(hidden, token_of)
    projected = _base_product(rows, gate_up, ends)
    if a is not None:
        if token_mask is not None:
            rows = _gather_masked(hidden, token_mask, token_of)
        _expand(_reduce(rows, a, ends), b.mT, ends, add_to=projected)
    return projected


def _base_product(rows: torch.Tensor, weight: "torch.Tensor | QuantizedWeight", ends: torch.Tensor) -> torch.Tensor:
    """Every row `[R, in]` times its expert's `[E, out, in]` -> `[R, out]`, zero past the last expert's rows."""
    if _is_multiplied(weight):
        return weight.grouped_linear(rows, F.pad(ends, (1, 0)))
    return _product(rows, _dense(weight, rows.dtype).mT, ends)


def _dense(weight: "torch.Tensor | QuantizedWeight", dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize(dtype) if is_quantized(weight) else weight


def _mask(x: torch.Tensor, dropout: float) -> torch.Tensor | None:
    """True where an element is kept; None if all are."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


def _masked_(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x.mul_(mask)


def _gather_masked(hidden: torch.Tensor, mask: torch.Tensor | None, token_of: torch.Tensor) -> torch.Tensor:
    return gather(hidden if mask is None else hidden * mask, token_of)


def _keeps_projections(device: torch.device) -> bool:
    """On a CPU the gate and up projections `[R, 2I]` are kept: an eighth to a quarter of a step's time for little
    memory (measured by `benchmarks/expert_lora.py`)."""
    return device.type == "cpu"


def _takes_grouped_mm(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    return device.type != "cpu" and dtype in DTYPES and all(width * dtype.itemsize % 16 == 0 for width in widths)


# Rows within the adapters are `[R, r]`; or, where that is faster, `[R, E r]`: the products with all experts' factors
# side by side, of which a row keeps its own expert's and the others are zero.


def _side_by_side(rows: torch.Tensor, factor: torch.Tensor) -> bool:
    """A CPU multiplies a few columns in bf16 as slowly as many."""
    few = factor.shape[0] * factor.shape[1] <= 256
    return few and rows.device.type == "cpu" and rows.dtype == torch.bfloat16


def _reduce(rows: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows `[R, i]` times their experts' `[E, r, i]`."""
    if not _side_by_side(rows, factor):
        return _product(rows, factor.mT, ends)
    expert = torch.searchsorted(ends, torch.arange(len(rows), dtype=ends.dtype), right=True)
    column = torch.arange(len(ends)).repeat_interleave(factor.shape[1])
    return torch.mm(rows, factor.flatten(0, 1).t()).masked_fill_(expert[:, None] != column, 0)


def _expand(
    inner: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `inner` times their experts' `[E, r, o]` -> `[R, o]`."""
    if not _side_by_side(inner, factor):
        return _product(inner, factor, ends, add_to)
    factor = factor.flatten(0, 1)
    return torch.mm(inner, factor) if add_to is None else add_to.addmm_(inner, factor)


def _factor_grad(inner: torch.Tensor, rows: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`inner^T rows` over each expert's rows `[R, a]` -> `[E, r, a]`, as `factor`."""
    if not _side_by_side(inner, factor):
        return _outer(inner, rows, ends)
    return torch.mm(inner.t(), rows).view(factor.shape)


def _product(
    rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    """Every row `[R, i]` times its expert's `[E, i, o]` -> `[R, o]`, zero past the last expert's rows."""
    if _takes_grouped_mm(rows.device, rows.dtype, *weights.shape[1:]):
        product = clear_tail(F.grouped_mm(rows, weights, offs=ends), ends)
        return product if add_to is None else add_to.add_(product)
    output = rows.new_empty(rows.shape[0], weights.shape[2]) if add_to is None else add_to
    for rows_, output_, weight in zip(_by_expert(rows, ends), _by_expert(output, ends), weights.unbind(), strict=True):
        output_.addmm_(rows_, weight, beta=0 if add_to is None else 1)
    return clear_tail(output, ends)


def _outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`left^T right` over each expert's rows: `[R, a]`, `[R, b]` -> `[E, a, b]`."""
    if _takes_grouped_mm(left.device, left.dtype, left.shape[1], right.shape[1]):
        if not len(left):
            return left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
        # On Blackwell an expert without rows gets whatever the memory held (torch 2.9 to 2.11).
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return F.grouped_mm(left.t(), right, offs=ends).masked_fill_(empty[:, None, None], 0)
    output = left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
    for left_, right_, output_ in zip(_by_expert(left, ends), _by_expert(right, ends), output.unbind(), strict=True):
        torch.mm(left_.t(), right_, out=output_)
    return output


def _by_expert(rows: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows[: int(ends[-1])].split(ends.diff(prepend=ends.new_zeros(1)).tolist())
