"""RoPE kernel: one program per block of tokens and heads, and the first head block of a token takes the key as well.

In place only the rope columns are read and written. Out of place, as backward needs it, the others are copied too.
"""

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config


@triton.jit
def _rotate_tile(
    x_ptr,
    y_ptr,
    x_row,  # [TOKENS, HEADS, 1] int64: where the first rope column of each row is
    y_row,
    mask,  # [TOKENS, HEADS, 1]
    cos,  # [TOKENS, 1, PAIRS] fp32
    sin,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROPE: tl.constexpr,
    NEIGHBOURS_IN: tl.constexpr,  # pairs are neighbours in x, else halves
    NEIGHBOURS_OUT: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    pair = tl.arange(0, PAIRS)[None, None, :]
    column = tl.arange(0, 2 * PAIRS)[None, None, :]
    if NEIGHBOURS_IN:
        x = tl.load(x_ptr + x_row + column, mask=mask & (column < ROPE), other=0.0)
        first, second = tl.split(tl.reshape(x, (TOKENS, HEADS, PAIRS, 2)))
    else:
        first = tl.load(x_ptr + x_row + pair, mask=mask & (pair < ROPE // 2), other=0.0)
        second = tl.load(x_ptr + x_row + ROPE // 2 + pair, mask=mask & (pair < ROPE // 2), other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    rotated_first = (first * cos - second * sin).to(y_ptr.dtype.element_ty)
    rotated_second = (second * cos + first * sin).to(y_ptr.dtype.element_ty)
    if IN_PLACE:
        tl.debug_barrier()  # a column moves to where another thread reads: all of them have read before one writes
    if NEIGHBOURS_OUT:
        y = tl.reshape(tl.join(rotated_first, rotated_second), (TOKENS, HEADS, 2 * PAIRS))
        tl.store(y_ptr + y_row + column, y, mask=mask & (column < ROPE))
    else:
        tl.store(y_ptr + y_row + pair, rotated_first, mask=mask & (pair < ROPE // 2))
        tl.store(y_ptr + y_row + ROPE // 2 + pair, rotated_second, mask=mask & (pair < ROPE // 2))


@triton.jit
def _rope_kernel(
    queries_ptr,  # [batch, length, heads, NOPE + ROPE], adjacent columns
    key_ptr,  # [batch, length, ROPE], adjacent columns
    cos_ptr,  # [batch or 1, length, ROPE / 2] contiguous
    sin_ptr,
    rotated_queries_ptr,  # like queries, adjacent columns; queries_ptr itself if IN_PLACE
    rotated_key_ptr,  # [batch, length, ROPE] contiguous
    tokens,  # batch * length
    length,
    heads,
    queries_batch_stride,
    queries_token_stride,
    queries_head_stride,
    rotated_batch_stride,
    rotated_token_stride,
    rotated_head_stride,
    key_batch_stride,
    key_token_stride,
    angle_batch_stride,  # of cos and sin; 0 if all sequences have the same positions
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    INVERSE: tl.constexpr,  # from halves back to the layout that INTERLEAVE says
    IN_PLACE: tl.constexpr,
):
    head_blocks = tl.cdiv(heads, HEADS)
    token = tl.program_id(0) // head_blocks * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    head = (tl.program_id(0) % head_blocks).to(tl.int64) * HEADS + tl.arange(0, HEADS)[None, :, None]
    sequence, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, None, :]
    angle = sequence * angle_batch_stride + position * (ROPE // 2) + pair
    known = (token < tokens) & (pair < ROPE // 2)
    cos = tl.load(cos_ptr + angle, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=known, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    NEIGHBOURS_IN: tl.constexpr = INTERLEAVE and not INVERSE
    NEIGHBOURS_OUT: tl.constexpr = INTERLEAVE and INVERSE

    mask = (token < tokens) & (head < heads)
    row = sequence * queries_batch_stride + position * queries_token_stride + head * queries_head_stride
    rotated_row = sequence * rotated_batch_stride + position * rotated_token_stride + head * rotated_head_stride
    _rotate_tile(
        queries_ptr, rotated_queries_ptr, row + NOPE, rotated_row + NOPE, mask, cos, sin,
        TOKENS, HEADS, PAIRS, ROPE, NEIGHBOURS_IN, NEIGHBOURS_OUT, IN_PLACE,
    )  # fmt: skip
    if NOPE > 0 and not IN_PLACE:
        column = tl.arange(0, NOPE_BLOCK)[None, None, :]
        nope = tl.load(queries_ptr + row + column, mask=mask & (column < NOPE))
        tl.store(rotated_queries_ptr + rotated_row + column, nope, mask=mask & (column < NOPE))
    if tl.program_id(0) % head_blocks == 0:
        key_row = sequence * key_batch_stride + position * key_token_stride
        rotated_key_row = (sequence * length + position) * ROPE
        _rotate_tile(
            key_ptr, rotated_key_ptr, key_row, rotated_key_row, token < tokens, cos, sin,
            TOKENS, 1, PAIRS, ROPE, NEIGHBOURS_IN, NEIGHBOURS_OUT, False,
        )  # fmt: skip


def _launch(
    queries: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotated: torch.Tensor,
    interleave: bool,
    inverse: bool,
) -> torch.Tensor:
    """Writes the rotated queries to `rotated` (which may be `queries`) and returns the rotated key."""
    batch, length, heads, columns = queries.shape
    rope = key.shape[-1]
    key = key if key.stride(-1) == 1 else key.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    rotated_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    config = dict(kernel_config("rope", queries.device, tokens=bucket(batch * length)))
    rows = config.pop("ROWS")
    heads_block = min(rows, triton.next_power_of_2(heads))
    tokens_block = rows // heads_block
    if queries.numel():
        _rope_kernel[(triton.cdiv(batch * length, tokens_block) * triton.cdiv(heads, heads_block),)](
            queries,
            key,
            cos,
            sin,
            rotated,
            rotated_key,
            batch * length,
            length,
            heads,
            *queries.stride()[:3],
            *rotated.stride()[:3],
            *key.stride()[:2],
            0 if cos.shape[0] == 1 else cos.stride(0),
            NOPE=columns - rope,
            ROPE=rope,
            NOPE_BLOCK=triton.next_power_of_2(max(columns - rope, 1)),
            PAIRS=triton.next_power_of_2(rope // 2),
            TOKENS=tokens_block,
            HEADS=heads_block,
            INTERLEAVE=interleave,
            INVERSE=inverse,
            IN_PLACE=rotated is queries,
            **config,
        )
    return rotated_key


def rope_in_place(
    queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool
) -> torch.Tensor:
    """Overwrites the last columns of `queries [B, S, H, n + r]`; returns the rotated key, a new tensor."""
    return _launch(queries, key, cos, sin, queries, interleave, inverse=False)


def rope(
    queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> rotated queries and key, new contiguous tensors. `inverse`: from the rotated layout back, as gradients go."""
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    rotated = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    return rotated, _launch(queries, key, cos, sin, rotated, interleave, inverse)
