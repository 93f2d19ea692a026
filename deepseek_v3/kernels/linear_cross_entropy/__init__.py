"""Linear layer and cross-entropy in one op, for the main head and the MTP heads that share it (paper 2.2)."""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_i row_weights_i * nll_i` with `nll_i = logsumexp(z_i) - z_i[labels_i]`, `z = hidden @ weight.T`, in nats.

    `hidden [N, H]` (the rows of the main and the MTP heads together) and `weight [V, H]` of one dtype, `labels [N]`
    int64 in `[0, V)`, `row_weights [N]` -> the sum, differentiable in `hidden` and `weight`, and the detached
    `nll [N]`; both fp32 (fp64 for fp64 inputs). A row that does not count has weight 0 and any label in range: labels
    are not checked. Exact; memory does not grow with N x V.

    The logits of a chunk of rows live once: forward turns them into gradients, whose scale enters in backward. So
    backward costs next to nothing, and without gradients (`no_grad`, a frozen weight) theirs are not computed.
    """
    _check(hidden, weight, labels, row_weights)
    if not uses_triton(hidden):
        return reference.linear_cross_entropy(hidden, weight, labels, row_weights)
    grad = torch.is_grad_enabled()
    needs_hidden, needs_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    loss, nll, *_ = torch.ops.deepseek_v3.linear_cross_entropy(
        hidden, weight, labels, row_weights.float(), needs_hidden, needs_weight
    )
    return loss, nll


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, row_weights: torch.Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; they have to be [N, H] and [V, H]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; they have to be of one dtype")
    for name, per_row in (("labels", labels), ("row_weights", row_weights)):
        if per_row.shape != hidden.shape[:1]:
            raise ValueError(f"{name} is {list(per_row.shape)}; it has to be [{hidden.shape[0]}], like hidden's rows")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype}; it has to be torch.int64")


@custom_op("deepseek_v3::linear_cross_entropy")
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    row_weights: torch.Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import linear_cross_entropy_forward

    return linear_cross_entropy_forward(hidden, weight, labels, row_weights, needs_hidden, needs_weight)


@_forward.register_fake
def _(hidden, weight, labels, row_weights, needs_hidden, needs_weight):
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    return (
        row_weights.new_empty(()),
        row_weights.new_empty(row_weights.shape),
        grad_hidden,
        grad_weight,
        row_weights.new_empty(()),
    )


@custom_op("deepseek_v3::linear_cross_entropy_backward")
def _backward(relative_grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .triton_impl import linear_cross_entropy_backward

    return linear_cross_entropy_backward(relative_grad, factor, dtype)


@_backward.register_fake
def _(relative_grad, factor, dtype):
    return relative_grad.new_empty(relative_grad.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    hidden, _, _, _, ctx.needs_hidden, ctx.needs_weight = inputs
    _, nll, *gradients = output
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(nll, *gradients)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_loss, *_):
    grad_hidden, grad_weight, largest = ctx.saved_tensors
    if grad_loss is None:
        return None, None, None, None, None, None
    backward, factor = torch.ops.deepseek_v3.linear_cross_entropy_backward, grad_loss * largest
    return (
        backward(grad_hidden, factor, ctx.dtype) if ctx.needs_hidden else None,
        backward(grad_weight, factor, ctx.dtype) if ctx.needs_weight else None,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)
