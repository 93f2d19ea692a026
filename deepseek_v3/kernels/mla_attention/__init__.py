"""MLA attention of prefill and training: causal, over packed documents, with one rotary key for all heads."""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference


def mla_attention(
    query: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of multi-head latent attention in its expanded form (paper 2.1.1, eq. 10).

    `softmax_j(scale * (q_i^C . k_j^C + q_i^R . k_j^R)) v_j` over the keys j that query i may see. `query
    [B, S, H, n + r]` holds q^C (n columns) and q^R (r columns) of each head, `key_nope [B, T, H, n]` is k^C, `key_rope
    [B, T, r]` is k^R, which all heads share and which is never copied to them, `value [B, T, H, v]` -> `[B, S, H, v]`.
    All have one floating dtype; softmax and sums are in fp32. Layouts are free as long as columns are adjacent:
    key_nope and value may be slices of one `[B, T, H, n + v]` tensor.

    Query i stands at key position `i + T - S` and sees no later key (T >= S; T = S in training).
    `document_starts [B, S]` int32 is the first key position that each query may see: the start of its document where
    documents are packed into a row, the first real token where a row is padded on the left. A query whose start lies
    after its own position sees nothing, gives 0, and has no gradient. Any starts are right; time is saved where they
    grow with the position, since then whole blocks of keys are skipped.

    ValueError if shapes, dtypes or scale do not fit together; with Triton also if n, r or v is no power of two >= 16.
    """
    _check(query, key_nope, key_rope, value, scale, document_starts)
    if not uses_triton(query):
        return reference.mla_attention(query, key_nope, key_rope, value, scale, document_starts)
    for name, x in (("key_nope", key_nope), ("key_rope", key_rope), ("value", value)):
        columns = x.shape[-1]
        if columns < 16 or columns & (columns - 1):
            raise ValueError(f"{name} has {columns} columns; allowed with Triton: a power of two of at least 16")
    return torch.ops.deepseek_v3.mla_attention(query, key_nope, key_rope, value, scale, document_starts)[0]


def _check(
    query: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    document_starts: torch.Tensor | None,
) -> None:
    named = {"query": query, "key_nope": key_nope, "key_rope": key_rope, "value": value}
    for name, x in named.items():
        if x.dim() != (3 if name == "key_rope" else 4):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; allowed: {3 if name == 'key_rope' else 4} dimensions"
            )
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}; allowed: the query's dtype, {query.dtype}")
    batch, length, heads, _ = query.shape
    total = key_nope.shape[1]
    columns = key_nope.shape[-1] + key_rope.shape[-1]
    expected = {
        "query": (batch, length, heads, columns),
        "key_nope": (batch, total, heads, key_nope.shape[-1]),
        "key_rope": (batch, total, key_rope.shape[-1]),
        "value": (batch, total, heads, value.shape[-1]),
    }
    for name, shape in expected.items():
        if named[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; allowed beside the other inputs: {shape}")
    if total < length:
        raise ValueError(f"key_nope has {total} positions; allowed: at least the query's {length}")
    if document_starts is not None and document_starts.shape != (batch, length):
        raise ValueError(f"document_starts has shape {tuple(document_starts.shape)}; allowed: {(batch, length)}")
    if document_starts is not None and document_starts.dtype != torch.int32:
        raise ValueError(f"document_starts is {document_starts.dtype}; allowed: {torch.int32}")
    if scale <= 0:
        raise ValueError(f"scale is {scale}; allowed: a positive number")


@custom_op("deepseek_v3::mla_attention")
def _forward(
    query: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    document_starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_impl import mla_attention_forward

    return mla_attention_forward(query, key_nope, key_rope, value, scale, document_starts)


@_forward.register_fake
def _(query, key_nope, key_rope, value, scale, document_starts):
    batch, length, heads, _ = query.shape
    output = value.new_empty(batch, length, heads, value.shape[-1])
    return output, value.new_empty(batch, heads, length, dtype=torch.float32)


@custom_op("deepseek_v3::mla_attention_backward")
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    document_starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import mla_attention_backward

    return mla_attention_backward(grad, query, key_nope, key_rope, value, output, logsumexp, scale, document_starts)


@_backward.register_fake
def _(grad, query, key_nope, key_rope, value, output, logsumexp, scale, document_starts):
    return tuple(x.new_empty(x.shape) for x in (query, key_nope, key_rope, value))


def _setup_context(ctx, inputs, output):
    query, key_nope, key_rope, value, ctx.scale, document_starts = inputs
    ctx.save_for_backward(query, key_nope, key_rope, value, *output, document_starts)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    *tensors, document_starts = ctx.saved_tensors
    grads = torch.ops.deepseek_v3.mla_attention_backward(grad, *tensors, ctx.scale, document_starts)
    return *grads, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
