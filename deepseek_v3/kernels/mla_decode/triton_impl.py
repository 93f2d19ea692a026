"""Absorbed MLA decode: attention of all heads on the latent cache in splits of its keys, then the merge of the splits.

A program takes a block of rows (a row is one head of one query) over every n-th block of a sequence's keys, n being
the number of splits, and reads each latent once, as key and as value. The splits are interleaved so that all of them
have work where a mask shows only the beginning of a static cache; what lies after its last visible key is not read.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config, num_programs
from ..mla_attention.triton_common import LOG2E, load_rows, rows_source

# Blocks of keys whose mask one load looks at.
_SCAN = tl.constexpr(32)


@triton.jit
def _visible(mask, hidden, ADDITIVE: tl.constexpr):
    if ADDITIVE:
        return mask > hidden
    else:
        return mask != 0


@triton.jit
def _mla_decode_kernel(
    query_latent_ptr,  # [B, S, H, LATENT]
    query_rope_ptr,  # [B, S, H, ROPE]
    latent_source,  # [B, T, 1, LATENT]
    key_rope_source,  # [B, T, 1, ROPE]
    mask_ptr,  # [B, S, >= T] uint8 or floating; read if MASKED
    output_ptr,  # [splits, B, S, H, LATENT] contiguous
    logsumexp_ptr,  # [splits, B, S, H] fp32 contiguous, base 2; -inf where nothing is visible
    S,
    T,
    H,
    scale_log2,  # scale * log2(e)
    log2e,
    hidden,  # an additive mask hides the keys where it is no larger than this
    latent_batch_stride,
    latent_query_stride,
    latent_head_stride,
    rope_batch_stride,
    rope_query_stride,
    rope_head_stride,
    mask_batch_stride,
    mask_query_stride,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    ADDITIVE: tl.constexpr,
    ONE_QUERY: tl.constexpr,  # all rows of a block belong to one query
    TMA: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M  # the row blocks of a split run together: one reads the latents from L2
    split, batch, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    row = first_row + tl.arange(0, BLOCK_M)
    kept = row < S * H
    query, head = row // H, row % H
    column = tl.arange(0, BLOCK_N)[None, :]
    end = split * 0 + T
    mask_ptr += batch.to(tl.int64) * mask_batch_stride
    if MASKED:
        last = split * 0 - 1
        for of_query in range(first_row // H, tl.minimum(first_row + BLOCK_M - 1, S * H - 1) // H + 1):
            for first in range(split, tl.cdiv(T, BLOCK_N), splits * _SCAN):
                block = first + tl.arange(0, _SCAN)[:, None] * splits
                key = block * BLOCK_N + column
                mask = tl.load(mask_ptr + of_query * mask_query_stride + key, mask=key < T, other=0)
                visible = _visible(mask, hidden, ADDITIVE) & (key < T)
                last = tl.maximum(last, tl.max(tl.max(tl.where(visible, block, -1), 1), 0))
        end = tl.minimum((last + 1) * BLOCK_N, T)
        if ONE_QUERY:
            mask_ptr += first_row // H * mask_query_stride

    at = batch.to(tl.int64) * latent_batch_stride + query * latent_query_stride + head * latent_head_stride
    query_latent = tl.load(
        query_latent_ptr + at[:, None] + tl.arange(0, LATENT)[None, :], mask=kept[:, None], other=0.0
    )
    at = batch.to(tl.int64) * rope_batch_stride + query * rope_query_stride + head * rope_head_stride
    query_rope = tl.load(query_rope_ptr + at[:, None] + tl.arange(0, ROPE)[None, :], mask=kept[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, LATENT), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: weights where nothing is visible are 0, not NaN
    for first in tl.range(split * BLOCK_N, end, splits * BLOCK_N, disable_licm=True):
        latent = load_rows(latent_source, batch, first, 0, BLOCK_N, LATENT, TMA)
        key_rope = load_rows(key_rope_source, batch, first, 0, BLOCK_N, ROPE, TMA)
        scores = tl.dot(query_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(query_rope, tl.trans(key_rope), scores, input_precision="ieee") * scale_log2
        key = first + column
        visible = key < T
        if MASKED:
            if ONE_QUERY:
                mask = tl.load(mask_ptr + key, mask=visible, other=0)
            else:
                mask = tl.load(
                    mask_ptr + query[:, None] * mask_query_stride + key, mask=visible & kept[:, None], other=0
                )
            visible &= _visible(mask, hidden, ADDITIVE)
            if ADDITIVE:
                scores += mask.to(tl.float32) * log2e
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    at = (split.to(tl.int64) * tl.num_programs(2) + batch) * S * H + row
    output_ptrs = output_ptr + at[:, None] * LATENT + tl.arange(0, LATENT)[None, :]
    tl.store(output_ptrs, (acc / total[:, None]).to(output_ptr.dtype.element_ty), mask=kept[:, None])
    tl.store(logsumexp_ptr + at, tl.where(seen, largest + tl.log2(total), float("-inf")), mask=kept)


@triton.jit
def _mla_decode_merge_kernel(
    partial_ptr,  # [splits, rows, LATENT] fp32 contiguous
    logsumexp_ptr,  # [splits, rows] fp32 contiguous, base 2
    output_ptr,  # [rows, LATENT] contiguous
    splits,
    LATENT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One row: the mean of the splits' outputs, weighted by the sums of their weights."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, LATENT)
    acc = tl.zeros((LATENT,), tl.float32)
    total = 0.0
    largest = -1e30
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = split.to(tl.int64) * rows + row
        logsumexp = tl.load(logsumexp_ptr + at, mask=split < splits, other=float("-inf"))
        partial = tl.load(
            partial_ptr + at[:, None] * LATENT + column[None, :], mask=split[:, None] < splits, other=0.0
        )
        new_largest = tl.maximum(largest, tl.max(logsumexp, 0))
        weights = tl.exp2(logsumexp - new_largest)
        shrink = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(partial * weights[:, None], 0)
    output = acc / tl.where(total > 0, total, 1.0)
    tl.store(output_ptr + row * LATENT + column, output.to(output_ptr.dtype.element_ty))


@cache
def split_count(programs: int, blocks: int, slots: int) -> int:
    """Into how many splits to divide `blocks` of keys: one gives `programs` programs, and `slots` run at a time.

    The fewest, since each is written and read again, of those that leave about as little of the GPU idle as can be
    and have two blocks at least.
    """

    def busy(splits: int) -> float:
        return programs * splits / (slots * triton.cdiv(programs * splits, slots))

    choices = range(1, max(1, min(blocks // 2, 128)) + 1)
    enough = 0.95 * max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= enough)


def mla_decode(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """-> `[B, S, H, c]` contiguous."""
    query_latent, query_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (query_latent, query_rope))
    batch, length, heads, columns = query_latent.shape
    keys, rows = latent.shape[1], length * heads
    output = torch.empty(query_latent.shape, dtype=latent.dtype, device=latent.device)
    if not output.numel():
        return output
    config = kernel_config(
        "mla_decode", latent.device, rows=bucket(rows), columns=columns, bytes=latent.element_size()
    )
    row_blocks = triton.cdiv(rows, config["BLOCK_M"])
    splits = split_count(row_blocks * batch, triton.cdiv(keys, config["BLOCK_N"]), num_programs(latent.device))
    partial = output
    if splits > 1:
        partial = torch.empty(splits, *output.shape, dtype=torch.float32, device=output.device)
    logsumexp = torch.empty(splits, batch, length, heads, dtype=torch.float32, device=output.device)

    additive = mask is not None and mask.dtype != torch.bool
    hidden = torch.finfo(mask.dtype).min if mask is not None and additive else 0.0
    mask_strides = (0, 0)
    if mask is not None:
        mask = mask.squeeze(1) if additive else mask.squeeze(1).view(torch.uint8)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        mask_strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1))
    _mla_decode_kernel[(row_blocks, splits, batch)](
        query_latent,
        query_rope,
        rows_source(latent.unsqueeze(2), config["BLOCK_N"], config["TMA"]),
        rows_source(key_rope.unsqueeze(2), config["BLOCK_N"], config["TMA"]),
        latent if mask is None else mask,
        partial,
        logsumexp,
        length,
        keys,
        heads,
        scale * LOG2E,
        LOG2E,
        hidden,
        *query_latent.stride()[:3],
        *query_rope.stride()[:3],
        *mask_strides,
        LATENT=columns,
        ROPE=key_rope.shape[-1],
        MASKED=mask is not None,
        ADDITIVE=additive,
        ONE_QUERY=length == 1 or heads % config["BLOCK_M"] == 0,
        **config,
    )
    if splits > 1:
        config = kernel_config("mla_decode_merge", latent.device, columns=columns)
        _mla_decode_merge_kernel[(batch * rows,)](partial, logsumexp, output, splits, LATENT=columns, **config)
    return output
