"""MLA attention, backward, in two kernels that both recompute the weights from the saved logsumexp.

The first takes a query block over its key blocks: gradient of the query, and `delta`, the row products of the output
and its gradient, which the second needs. That one takes a key block over its query blocks: gradients of the keys and
values. The heads share the rotary key, so each writes its part of that gradient; their sum needs no atomics.

Blocks that stay for the whole loop are read through pointers on every device: from there they go to shared memory,
from the tensor memory accelerator they would go to registers, and the accumulators leave none. For the same reason
nothing is hoisted out of the loops.
"""

import torch
import triton
import triton.language as tl

from .triton_common import LOG2E, block_config, key_runs, load_rows, query_runs, rows_source


@triton.jit
def _query_gradient(
    grad_query_nope,  # [BLOCK_M, NOPE] and
    grad_query_rope,  # [BLOCK_M, ROPE], summed here
    query_nope,
    query_rope,
    grad,
    logsumexp,
    delta,
    key_nope_source,
    key_rope_source,
    value_source,
    batch,
    head,
    position,
    starts,
    begin,
    end,
    scale_log2,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the part of the keys from `begin` to `end`."""
    for block in tl.range(begin, end, BLOCK_N, disable_licm=True):
        key_nope = load_rows(key_nope_source, batch, block, head, BLOCK_N, NOPE, TMA)
        key_rope = load_rows(key_rope_source, batch, block, 0, BLOCK_N, ROPE, TMA)
        value = load_rows(value_source, batch, block, head, BLOCK_N, VALUE, TMA)
        scores = tl.dot(query_nope, tl.trans(key_nope), input_precision="ieee")
        scores = tl.dot(query_rope, tl.trans(key_rope), scores, input_precision="ieee")
        if MASKED:
            key = block + tl.arange(0, BLOCK_N)[None, :]
            visible = key <= position[:, None]
            if DOCUMENTS:
                visible &= key >= starts[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.exp2(scores * scale_log2 - logsumexp[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[:, None])).to(key_nope.dtype)
        grad_query_nope = tl.dot(grad_scores, key_nope, grad_query_nope, input_precision="ieee")
        grad_query_rope = tl.dot(grad_scores, key_rope, grad_query_rope, input_precision="ieee")
    return grad_query_nope, grad_query_rope


@triton.jit
def _mla_attention_backward_query_kernel(
    query_nope_source,  # [B, S, H, NOPE]
    query_rope_source,  # [B, S, H, ROPE]
    key_nope_source,  # [B, T, H, NOPE]
    key_rope_source,  # [B, T, 1, ROPE]
    value_source,  # [B, T, H, VALUE]
    output_source,  # [B, S, H, VALUE]
    grad_source,  # [B, S, H, VALUE], gradient of the output
    starts_ptr,  # [B, S] int32 contiguous; read if DOCUMENTS
    logsumexp_ptr,  # [B, H, S] fp32 contiguous, base 2
    delta_ptr,  # [B, H, S] fp32 contiguous; written
    grad_query_ptr,  # [B, S, H, NOPE + ROPE] contiguous
    S,
    T,
    H,
    scale,
    scale_log2,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    head, batch = tl.program_id(1), tl.program_id(2)
    row = first + tl.arange(0, BLOCK_M)
    position = row + (T - S)
    starts = position
    if DOCUMENTS:
        starts = tl.load(starts_ptr + batch.to(tl.int64) * S + tl.minimum(row, S - 1))

    output = load_rows(output_source, batch, first, head, BLOCK_M, VALUE, False)
    grad = load_rows(grad_source, batch, first, head, BLOCK_M, VALUE, False)
    delta = tl.sum(output.to(tl.float32) * grad.to(tl.float32), axis=1)
    at = (batch.to(tl.int64) * H + head) * S + row
    tl.store(delta_ptr + at, delta, mask=row < S)
    logsumexp = tl.load(logsumexp_ptr + at, mask=row < S, other=0.0)
    query_nope = load_rows(query_nope_source, batch, first, head, BLOCK_M, NOPE, False)
    query_rope = load_rows(query_rope_source, batch, first, head, BLOCK_M, ROPE, False)
    grad_query_nope = tl.zeros((BLOCK_M, NOPE), tl.float32)
    grad_query_rope = tl.zeros((BLOCK_M, ROPE), tl.float32)
    bounds = key_runs(first + (T - S), starts, T, BLOCK_M, BLOCK_N, DOCUMENTS)
    for run in tl.static_range(3):
        if DOCUMENTS or run > 0:
            grad_query_nope, grad_query_rope = _query_gradient(
                grad_query_nope,
                grad_query_rope,
                query_nope,
                query_rope,
                grad,
                logsumexp,
                delta,
                key_nope_source,
                key_rope_source,
                value_source,
                batch,
                head,
                position,
                starts,
                bounds[run],
                bounds[run + 1],
                scale_log2,
                NOPE,
                ROPE,
                VALUE,
                BLOCK_N,
                run != 1,
                DOCUMENTS,
                TMA,
            )
    dtype = grad_query_ptr.dtype.element_ty
    pointers = grad_query_ptr + ((batch.to(tl.int64) * S + row) * H + head)[:, None] * (NOPE + ROPE)
    mask = row[:, None] < S
    tl.store(pointers + tl.arange(0, NOPE)[None, :], (grad_query_nope * scale).to(dtype), mask=mask)
    tl.store(pointers + NOPE + tl.arange(0, ROPE)[None, :], (grad_query_rope * scale).to(dtype), mask=mask)


@triton.jit
def _key_value_gradient(
    grad_key_nope,  # [BLOCK_N, NOPE],
    grad_key_rope,  # [BLOCK_N, ROPE] and
    grad_value,  # [BLOCK_N, VALUE], summed here
    key_nope,
    key_rope,
    value,
    key,
    query_nope_source,
    query_rope_source,
    grad_source,
    starts_ptr,
    logsumexp_ptr,
    delta_ptr,
    batch,
    head,
    begin,
    end,
    S,
    T,
    scale_log2,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the part of the queries from `begin` to `end`. Scores are `[keys, queries]` here."""
    for block in tl.range(begin, end, BLOCK_M, disable_licm=True):
        row = block + tl.arange(0, BLOCK_M)
        query_nope = load_rows(query_nope_source, batch, block, head, BLOCK_M, NOPE, TMA)
        query_rope = load_rows(query_rope_source, batch, block, head, BLOCK_M, ROPE, TMA)
        grad = load_rows(grad_source, batch, block, head, BLOCK_M, VALUE, TMA)
        # Past the last query the weights are finite, and what they are multiplied with is zero.
        logsumexp = tl.load(logsumexp_ptr + row, mask=row < S, other=0.0)
        delta = tl.load(delta_ptr + row, mask=row < S, other=0.0)
        scores = tl.dot(key_nope, tl.trans(query_nope), input_precision="ieee")
        scores = tl.dot(key_rope, tl.trans(query_rope), scores, input_precision="ieee")
        if MASKED:
            visible = key[:, None] <= row[None, :] + (T - S)
            if DOCUMENTS:
                starts = tl.load(starts_ptr + row, mask=row < S, other=0)
                visible &= key[:, None] >= starts[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.exp2(scores * scale_log2 - logsumexp[None, :])
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query_nope.dtype)
        grad_key_nope = tl.dot(grad_scores, query_nope, grad_key_nope, input_precision="ieee")
        grad_key_rope = tl.dot(grad_scores, query_rope, grad_key_rope, input_precision="ieee")
    return grad_key_nope, grad_key_rope, grad_value


@triton.jit
def _mla_attention_backward_key_value_kernel(
    query_nope_source,  # [B, S, H, NOPE]
    query_rope_source,  # [B, S, H, ROPE]
    key_nope_source,  # [B, T, H, NOPE]
    key_rope_source,  # [B, T, 1, ROPE]
    value_source,  # [B, T, H, VALUE]
    grad_source,  # [B, S, H, VALUE], gradient of the output
    starts_ptr,  # [B, S] int32 contiguous; read if DOCUMENTS
    logsumexp_ptr,  # [B, H, S] fp32 contiguous, base 2
    delta_ptr,  # [B, H, S] fp32 contiguous
    grad_key_nope_ptr,  # [B, T, H, NOPE] contiguous
    grad_key_rope_ptr,  # [B, H, T, ROPE] fp32 contiguous, the part of each head
    grad_value_ptr,  # [B, T, H, VALUE] contiguous
    S,
    T,
    H,
    scale,
    scale_log2,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N  # as they are, the longest come first
    head, batch = tl.program_id(1), tl.program_id(2)
    key = first + tl.arange(0, BLOCK_N)
    key_nope = load_rows(key_nope_source, batch, first, head, BLOCK_N, NOPE, False)
    key_rope = load_rows(key_rope_source, batch, first, 0, BLOCK_N, ROPE, False)
    value = load_rows(value_source, batch, first, head, BLOCK_N, VALUE, False)
    starts_ptr += batch.to(tl.int64) * S
    logsumexp_ptr += (batch.to(tl.int64) * H + head) * S
    delta_ptr += (batch.to(tl.int64) * H + head) * S
    grad_key_nope = tl.zeros((BLOCK_N, NOPE), tl.float32)
    grad_key_rope = tl.zeros((BLOCK_N, ROPE), tl.float32)
    grad_value = tl.zeros((BLOCK_N, VALUE), tl.float32)
    bounds = query_runs(first, starts_ptr, S, T, BLOCK_M, BLOCK_N, DOCUMENTS)
    for run in tl.static_range(3):
        if DOCUMENTS or run < 2:
            grad_key_nope, grad_key_rope, grad_value = _key_value_gradient(
                grad_key_nope,
                grad_key_rope,
                grad_value,
                key_nope,
                key_rope,
                value,
                key,
                query_nope_source,
                query_rope_source,
                grad_source,
                starts_ptr,
                logsumexp_ptr,
                delta_ptr,
                batch,
                head,
                bounds[run],
                bounds[run + 1],
                S,
                T,
                scale_log2,
                NOPE,
                ROPE,
                VALUE,
                BLOCK_M,
                run != 1,
                DOCUMENTS,
                TMA,
            )
    dtype = grad_value_ptr.dtype.element_ty
    at, mask = ((batch.to(tl.int64) * T + key) * H + head)[:, None], key[:, None] < T
    nope, rope, column = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :]
    tl.store(grad_key_nope_ptr + at * NOPE + nope, (grad_key_nope * scale).to(dtype), mask=mask)
    tl.store(grad_value_ptr + at * VALUE + column, grad_value.to(dtype), mask=mask)
    at = ((batch.to(tl.int64) * H + head) * T + key)[:, None]
    tl.store(grad_key_rope_ptr + at * ROPE + rope, grad_key_rope * scale, mask=mask)


def mla_attention_backward(
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
    """-> gradients of query, key_nope, key_rope and value, contiguous. Takes `[B, H, T, r]` fp32 of memory besides."""
    batch, length, heads, _ = query.shape
    total = key_nope.shape[1]
    grad_query, grad_key_nope, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key_nope, value)
    )
    if not grad_query.numel():
        return grad_query, grad_key_nope.zero_(), torch.zeros_like(key_rope), grad_value.zero_()
    grad_key_rope = torch.empty(batch, heads, *key_rope.shape[1:], dtype=torch.float32, device=query.device)
    delta = torch.empty_like(logsumexp)
    query_nope, query_rope = query.split([key_nope.shape[-1], key_rope.shape[-1]], dim=-1)
    key_rope = key_rope.unsqueeze(2)
    starts = query if document_starts is None else document_starts.contiguous()
    sizes = {
        "NOPE": key_nope.shape[-1],
        "ROPE": key_rope.shape[-1],
        "VALUE": value.shape[-1],
        "DOCUMENTS": document_starts is not None,
    }

    config = block_config("mla_attention_backward_query", query, value)
    queries, keys, tma = config["BLOCK_M"], config["BLOCK_N"], config["TMA"]
    _mla_attention_backward_query_kernel[(triton.cdiv(length, queries), heads, batch)](
        rows_source(query_nope, queries, False),
        rows_source(query_rope, queries, False),
        rows_source(key_nope, keys, tma),
        rows_source(key_rope, keys, tma),
        rows_source(value, keys, tma),
        rows_source(output, queries, False),
        rows_source(grad, queries, False),
        starts,
        logsumexp,
        delta,
        grad_query,
        length,
        total,
        heads,
        scale,
        scale * LOG2E,
        **sizes,
        **config,
    )
    config = block_config("mla_attention_backward_key_value", query, value)
    queries, keys, tma = config["BLOCK_M"], config["BLOCK_N"], config["TMA"]
    _mla_attention_backward_key_value_kernel[(triton.cdiv(total, keys), heads, batch)](
        rows_source(query_nope, queries, tma),
        rows_source(query_rope, queries, tma),
        rows_source(key_nope, keys, False),
        rows_source(key_rope, keys, False),
        rows_source(value, keys, False),
        rows_source(grad, queries, tma),
        starts,
        logsumexp,
        delta,
        grad_key_nope,
        grad_key_rope,
        grad_value,
        length,
        total,
        heads,
        scale,
        scale * LOG2E,
        **sizes,
        **config,
    )
    return grad_query, grad_key_nope, grad_key_rope.sum(1).to(value.dtype), grad_value
