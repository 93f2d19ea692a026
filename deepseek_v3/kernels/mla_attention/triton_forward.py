"""MLA attention, forward: one program per query block, head and sequence, with an online softmax over key blocks.

A score is two products, one over the head's own n columns and one over the r rotary columns that all heads share, so
the rotary key is read as it is stored and never expanded to the heads.
"""

import torch
import triton
import triton.language as tl

from .triton_common import LOG2E, block_config, key_runs, load_rows, rows_source


@triton.jit
def _attend(
    acc,  # [BLOCK_M, VALUE], sum of weighted values
    total,  # [BLOCK_M], sum of weights
    largest,  # [BLOCK_M], the largest score so far: weights are relative to it
    query_nope,
    query_rope,
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
    """Take the keys from `begin` to `end` into `acc`, `total` and `largest`."""
    for block in tl.range(begin, end, BLOCK_N):
        key_nope = load_rows(key_nope_source, batch, block, head, BLOCK_N, NOPE, TMA)
        key_rope = load_rows(key_rope_source, batch, block, 0, BLOCK_N, ROPE, TMA)
        scores = tl.dot(query_nope, tl.trans(key_nope), input_precision="ieee")
        scores = tl.dot(query_rope, tl.trans(key_rope), scores, input_precision="ieee")
        if MASKED:
            key = block + tl.arange(0, BLOCK_N)[None, :]
            visible = key <= position[:, None]
            if DOCUMENTS:
                visible &= key >= starts[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(value_source, batch, block, head, BLOCK_N, VALUE, TMA)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, total, largest


@triton.jit
def _mla_attention_forward_kernel(
    query_nope_source,  # [B, S, H, NOPE]
    query_rope_source,  # [B, S, H, ROPE]
    key_nope_source,  # [B, T, H, NOPE]
    key_rope_source,  # [B, T, 1, ROPE]
    value_source,  # [B, T, H, VALUE]
    starts_ptr,  # [B, S] int32 contiguous, the first key a query may see; read if DOCUMENTS
    output_ptr,  # [B, S, H, VALUE] contiguous
    logsumexp_ptr,  # [B, H, S] fp32 contiguous, base 2; +inf where a query sees nothing
    S,
    T,
    H,
    scale_log2,  # scale * log2(e)
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    # The query blocks of one head run together and share its keys in L2; the longest start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    row = first + tl.arange(0, BLOCK_M)
    position = row + (T - S)
    starts = position
    if DOCUMENTS:  # the tail repeats the last query's start, so that it does not change which keys are needed
        starts = tl.load(starts_ptr + batch.to(tl.int64) * S + tl.minimum(row, S - 1))

    query_nope = load_rows(query_nope_source, batch, first, head, BLOCK_M, NOPE, TMA)
    query_rope = load_rows(query_rope_source, batch, first, head, BLOCK_M, ROPE, TMA)
    acc = tl.zeros((BLOCK_M, VALUE), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: weights where nothing is visible are 0, not NaN
    bounds = key_runs(first + (T - S), starts, T, BLOCK_M, BLOCK_N, DOCUMENTS)
    for run in tl.static_range(3):
        if DOCUMENTS or run > 0:
            acc, total, largest = _attend(
                acc,
                total,
                largest,
                query_nope,
                query_rope,
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
    visible = total > 0
    total = tl.where(visible, total, 1.0)
    at = ((batch.to(tl.int64) * S + row) * H + head)[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(output_ptr + at, (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=row[:, None] < S)
    logsumexp = tl.where(visible, largest + tl.log2(total), float("inf"))
    tl.store(logsumexp_ptr + (batch.to(tl.int64) * H + head) * S + row, logsumexp, mask=row < S)


def mla_attention_forward(
    query: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    document_starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> output `[B, S, H, v]` and logsumexp `[B, H, S]` fp32 in base 2."""
    batch, length, heads, _ = query.shape
    output = torch.empty(batch, length, heads, value.shape[-1], dtype=value.dtype, device=value.device)
    logsumexp = torch.empty(batch, heads, length, dtype=torch.float32, device=value.device)
    config = block_config("mla_attention_forward", query, value)
    queries, keys, tma = config["BLOCK_M"], config["BLOCK_N"], config["TMA"]
    query_nope, query_rope = query.split([key_nope.shape[-1], key_rope.shape[-1]], dim=-1)
    if output.numel():
        _mla_attention_forward_kernel[(triton.cdiv(length, queries), heads, batch)](
            rows_source(query_nope, queries, tma),
            rows_source(query_rope, queries, tma),
            rows_source(key_nope, keys, tma),
            rows_source(key_rope.unsqueeze(2), keys, tma),
            rows_source(value, keys, tma),
            query if document_starts is None else document_starts.contiguous(),
            output,
            logsumexp,
            length,
            key_nope.shape[1],
            heads,
            scale * LOG2E,
            NOPE=key_nope.shape[-1],
            ROPE=key_rope.shape[-1],
            VALUE=value.shape[-1],
            DOCUMENTS=document_starts is not None,
            **config,
        )
    return output, logsumexp
