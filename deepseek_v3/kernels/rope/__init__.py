"""Rotary position embedding of MLA: the rope columns of each query head, and the key that all heads share."""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference


def rotate_queries_and_key_(
    queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the last r columns of each query head, and the key, by the angles of their positions (paper 2.1.1).

    Pair i, `(x_i, y_i)`, becomes `(x_i cos_i - y_i sin_i, y_i cos_i + x_i sin_i)`. `interleave`: pairs are neighbours
    `(x0, y0, x1, y1 ...)` as in DeepSeek's checkpoints, else the two halves `(x0, x1 ..., y0, y1 ...)`. The result is
    laid out in halves either way: queries and keys agree, and their dot product does not see the order.

    `queries [B, S, H, n + r]` with adjacent columns, `key [B, S, r]` (a slice of wider rows is fine), `cos` and `sin`
    `[B or 1, S, r/2]`, floating point -> the rotated queries and key, each in its own dtype. The gradient is the
    inverse rotation; `cos` and `sin` have none.

    On a GPU the rotation is done in fp32 and the queries are overwritten, so use what is returned: it is the only
    thing that holds the rotated queries everywhere. They are a new tensor in plain torch, and also on a GPU where a
    gradient is recorded and `torch.compile` is tracing, or the queries are a part of a wider tensor (whose whole
    gradient autograd would copy), or only the key needs the gradient. The key is always a new, contiguous tensor, so
    that `key` may come from `split`, and what backward keeps of the row beside it stays valid.

    Raises ValueError for shapes that do not fit, and torch's RuntimeError for queries that are (a view of) a leaf
    that requires a gradient.
    """
    _check(queries, key, cos, sin)
    if not uses_triton(queries):
        return reference.rotate_queries_and_key(queries, key, cos, sin, interleave)
    if not (torch.is_grad_enabled() and (queries.requires_grad or key.requires_grad)):
        return queries, torch.ops.deepseek_v3.rope_in_place(queries, key, cos, sin, interleave)
    if torch.compiler.is_compiling():
        return torch.ops.deepseek_v3.rope(queries, key, cos, sin, interleave, False)
    # What autograd modifies is the tensor behind the view `projection(x).view(B, S, H, n + r)`: for a view itself it
    # would pass the gradient through four copies, and allow no second output.
    whole = queries._base if queries._base is not None else queries
    if queries.requires_grad and whole.requires_grad and whole.is_leaf:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    same_memory = whole.numel() == queries.numel() and whole.is_contiguous() and queries.is_contiguous()
    if not (same_memory and queries.requires_grad and whole.requires_grad):
        return torch.ops.deepseek_v3.rope(queries, key, cos, sin, interleave, False)
    whole, key = _RotateInPlace.apply(whole, queries.shape, key, cos, sin, interleave)
    return whole.view(queries.shape), key


def _check(queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if queries.dim() != 4 or (queries.shape[-1] > 1 and queries.stride(-1) != 1):
        found = f"{tuple(queries.shape)} with strides {queries.stride()}"
        raise ValueError(f"queries: found {found}; allowed: [B, S, H, n + r] with adjacent columns")
    batch, length, _, columns = queries.shape
    rope = key.shape[-1]
    if key.shape != (batch, length, rope) or rope % 2 or not 0 < rope <= columns:
        allowed = f"[{batch}, {length}, r] with an even r in [2, {columns}]"
        raise ValueError(f"key: found shape {tuple(key.shape)}; allowed for these queries: {allowed}")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape not in ((batch, length, rope // 2), (1, length, rope // 2)):
            allowed = f"[{batch} or 1, {length}, {rope // 2}]"
            raise ValueError(f"{name}: found shape {tuple(x.shape)}; allowed for these queries and key: {allowed}")


class _RotateInPlace(torch.autograd.Function):
    """The eager form while gradients are recorded. `whole`: the queries' memory, in any shape."""

    @staticmethod
    def forward(ctx, whole, shape, key, cos, sin, interleave):
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.interleave = shape, interleave
        ctx.mark_dirty(whole)
        return whole, torch.ops.deepseek_v3.rope_in_place(whole.view(shape), key, cos, sin, interleave)

    @staticmethod
    def backward(ctx, grad, grad_key):
        cos, sin = ctx.saved_tensors
        # Not in place: another consumer may hold the same gradient.
        grad_queries, grad_key = torch.ops.deepseek_v3.rope(
            grad.reshape(ctx.shape), grad_key, cos, sin, ctx.interleave, True
        )
        return grad_queries.view(grad.shape), None, grad_key, None, None, None


@custom_op("deepseek_v3::rope_in_place", mutates_args=("queries",))
def _in_place(
    queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool
) -> torch.Tensor:
    from .triton_impl import rope_in_place

    return rope_in_place(queries, key, cos, sin, interleave)


@_in_place.register_fake
def _(queries, key, cos, sin, interleave):
    return key.new_empty(key.shape)


@custom_op("deepseek_v3::rope")
def _functional(
    queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_impl import rope

    return rope(queries, key, cos, sin, interleave, inverse)


@_functional.register_fake
def _(queries, key, cos, sin, interleave, inverse):
    return queries.new_empty(queries.shape), key.new_empty(key.shape)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.interleave, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx, grad, grad_key):
    cos, sin = ctx.saved_tensors
    grads = torch.ops.deepseek_v3.rope(grad, grad_key, cos, sin, ctx.interleave, not ctx.inverse)
    return *grads, None, None, None, None


_functional.register_autograd(_autograd, setup_context=_setup_context)
