"""Blocks of rows for element-wise work in plain torch: on a CPU, what leaves the core's cache costs several times."""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 2**16  # fp32 temporaries of 256 KiB: a few of them fit a core's cache and the allocator reuses them


def row_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of the same rows of every tensor, a block at a time; all rows at once off the CPU or when compiling."""
    rows, columns = tensors[0].shape[0], tensors[0][:1].numel()
    if tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        rows = BLOCK_ELEMENTS // max(1, columns)
    return zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)
