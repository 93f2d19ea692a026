"""What ops on rows sorted by expert share: their `offsets`, int32 `[E+1]`. Expert e has the rows from `offsets[e]` to
`offsets[e+1]`; rows from `offsets[E]` on belong to no expert."""

from collections.abc import Iterator
from itertools import pairwise

import torch


def check_offsets(offsets: torch.Tensor, experts: int | None = None) -> None:
    """ValueError unless int32 `[E+1]`, for `experts` experts if that is given."""
    length = "E+1" if experts is None else experts + 1
    wrong = offsets.shape[0] < 2 if offsets.ndim == 1 and experts is None else list(offsets.shape) != [length]
    if offsets.dtype != torch.int32 or wrong:
        raise ValueError(f"offsets is {offsets.dtype} {list(offsets.shape)}; allowed: int32 [{length}]")


def expert_rows(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which. Waits for the device."""
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        if first < end:
            yield expert, slice(first, end)
