"""The sort of the choices by expert, and the list of row blocks ("tiles") that the grouped matrix products work on.

A counting sort in three launches: counts per block of choices and expert; their running sums over blocks, and over
experts; each choice to its slot, found as (slots of smaller experts) + (the same expert in earlier blocks) + (the same
expert earlier in the block). No atomics, hence stable and deterministic, and no size depends on the data.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK = 512  # choices per program of the sort
_TILES = 16  # tiles per program of the list


class Tiles(NamedTuple):
    """Blocks of at most `block_m` slots of one expert. `table [3, T]` int32: expert, first slot, end of the expert's
    slots. T is the most there can be; an unused tile has the empty range 0 to 0.
    """

    table: torch.Tensor
    block_m: int


@triton.jit
def _count_kernel(
    indices_ptr,  # [choices] int64
    counts_ptr,  # [blocks, BINS] int32
    choices,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(indices_ptr + choice, mask=choice < choices, other=0).to(tl.int32)
    counts = tl.histogram(expert, BINS, mask=choice < choices)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _sum_kernel(
    counts_ptr,  # [blocks, BINS] int32
    earlier_ptr,  # [blocks, BINS] int32, the same expert in earlier blocks
    offsets_ptr,  # [E + 1] int32
    blocks,
    num_experts,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.arange(0, BINS)
    earlier = tl.zeros((BINS,), tl.int32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)[:, None]
        at = block * BINS + expert[None, :]
        counts = tl.load(counts_ptr + at, mask=block < blocks, other=0)
        tl.store(earlier_ptr + at, earlier[None, :] + tl.cumsum(counts, axis=0) - counts, mask=block < blocks)
        earlier += tl.sum(counts, axis=0)
    tl.store(offsets_ptr + expert, tl.cumsum(earlier, axis=0) - earlier, mask=expert <= num_experts)


@triton.jit
def _place_kernel(
    indices_ptr,  # [choices] int64
    earlier_ptr,  # [blocks, BINS] int32, the same expert in earlier blocks
    offsets_ptr,  # [E + 1] int32
    order_ptr,  # [choices] int32
    slots_ptr,  # [choices] int32
    choices,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK
    choice = start + tl.arange(0, BLOCK)
    inside = choice < choices
    expert = tl.load(indices_ptr + choice, mask=inside, other=0).to(tl.int32)
    same = tl.zeros((CHUNK, BLOCK), tl.int32)  # summed over rows: the same expert earlier in this block
    for first in range(start, tl.minimum(start + BLOCK, choices), CHUNK):
        other = first + tl.arange(0, CHUNK)
        other_expert = tl.load(indices_ptr + other, mask=other < choices, other=0).to(tl.int32)
        same += ((other_expert[:, None] == expert[None, :]) & (other[:, None] < choice[None, :])).to(tl.int32)
    slot = tl.load(offsets_ptr + expert, mask=inside, other=0) + tl.sum(same, axis=0)
    slot += tl.load(earlier_ptr + tl.program_id(0) * BINS + expert, mask=inside, other=0)
    tl.store(order_ptr + slot, choice, mask=inside)
    tl.store(slots_ptr + choice, slot, mask=inside)


@triton.jit
def _tile_kernel(
    offsets_ptr,  # [E + 1] int32
    table_ptr,  # [3, tiles] int32
    tiles,
    num_experts,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.arange(0, BINS)[None, :]
    begin = tl.load(offsets_ptr + expert, mask=expert < num_experts, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=0)
    count = tl.cdiv(end - begin, BLOCK_M)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    nth = tile - (tl.cumsum(count, axis=1) - count)  # which of this expert's tiles
    mine = (nth >= 0) & (nth < count)
    at = table_ptr + tile
    tl.store(at, tl.sum(tl.where(mine, expert, 0), axis=1, keep_dims=True), mask=tile < tiles)
    first = tl.sum(tl.where(mine, begin + nth * BLOCK_M, 0), axis=1, keep_dims=True)
    tl.store(at + tiles, first, mask=tile < tiles)
    tl.store(at + 2 * tiles, tl.sum(tl.where(mine, end, 0), axis=1, keep_dims=True), mask=tile < tiles)


def expert_permutation(indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`indices [N, K]` int64 in [0, E] -> `order [N*K]`, `slots [N, K]`, `offsets [E+1]`, all int32."""
    indices = indices.contiguous()
    choices = indices.numel()
    blocks = max(1, triton.cdiv(choices, _BLOCK))  # without choices, one that writes offsets of 0
    bins = max(16, triton.next_power_of_2(num_experts + 1))
    order = torch.empty(choices, dtype=torch.int32, device=indices.device)
    slots = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=indices.device)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=indices.device)
    earlier = torch.empty_like(counts)
    _count_kernel[(blocks,)](indices, counts, choices, BINS=bins, BLOCK=_BLOCK)
    _sum_kernel[(1,)](counts, earlier, offsets, blocks, num_experts, BINS=bins, BLOCK=16, num_warps=8)
    _place_kernel[(blocks,)](
        indices, earlier, offsets, order, slots, choices, BINS=bins, BLOCK=_BLOCK, CHUNK=16, num_warps=8
    )
    return order, slots, offsets


def expert_tiles(offsets: torch.Tensor, choices: int, block_m: int) -> Tiles:
    """The tiles of `block_m` slots for `offsets [E+1]` of that many choices."""
    num_experts = offsets.shape[0] - 1
    active = min(num_experts, choices)  # experts with a choice: each has its last tile, the other tiles are full
    tiles = active + (choices - active) // block_m
    table = torch.empty(3, tiles, dtype=torch.int32, device=offsets.device)
    if tiles:
        _tile_kernel[(triton.cdiv(tiles, _TILES),)](
            offsets,
            table,
            tiles,
            num_experts,
            BLOCK_M=block_m,
            BINS=triton.next_power_of_2(num_experts),
            BLOCK=_TILES,
        )
    return Tiles(table, block_m)
