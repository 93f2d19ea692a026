"""The order of training data: a pure function of the seed and the global sample index.

Sample ``g`` of a run is row ``sample_order(n, seed, g // n)[g % n]``, and step ``s`` of global batch size ``B`` takes
samples ``[s * B, (s + 1) * B)``. Nothing else enters, so a run that resumes at step ``s``, or goes on with another
number of ranks, sees exactly the samples it would have seen.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from .packing import PackedDataset


@lru_cache(maxsize=4)
def sample_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch: int64 ``[n_rows]``, read-only.

    Sorts raw 64-bit words instead of calling ``Generator.permutation``: NumPy keeps the bits of a bit generator
    fixed across releases, but not the algorithms built on them, and a resumed run may have a newer NumPy.
    """
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(n_rows), kind="stable")
    order.setflags(write=False)
    return order


def batch_indices(n_rows: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Row numbers of the global batch of one step: int64 ``[batch_size]``. A batch may span two epochs.

    Raises:
        ValueError: `n_rows` or `batch_size` below 1, or a negative `step` or `seed`.
    """
    if n_rows < 1 or batch_size < 1 or step < 0 or seed < 0:
        raise ValueError(
            "batch_indices: n_rows and batch_size must be at least 1, step and seed at least 0; "
            f"found n_rows={n_rows}, batch_size={batch_size}, step={step}, seed={seed}"
        )
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n_rows)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = sample_order(n_rows, seed, int(epoch))[positions[chosen]]
    return rows


def iterate_batches(
    dataset: PackedDataset,
    batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield, without end, this rank's share of the global batch of `start_step`, `start_step` + 1, …

    Args:
        batch_size: rows of the global batch, over all ranks and accumulation steps. Rank ``r`` takes the ``r``-th
            contiguous share, so that the ranks' shares in order are the global batch.

    Yields:
        ``input_ids``, ``position_ids``, ``labels``: int64 CPU tensors ``[batch_size // world_size, sequence_length]``.

    Raises:
        ValueError: `rank` outside ``[0, world_size)``, or a `batch_size` that `world_size` does not divide. At the
            call, not at the first batch.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), found {rank}")
    if batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of world_size {world_size}, found {batch_size}")
    share = batch_size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    return _batches_from(dataset, batch_size, seed, start_step, mine)


def _batches_from(
    dataset: PackedDataset, batch_size: int, seed: int, step: int, mine: slice
) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield dataset.rows(batch_indices(len(dataset), step, batch_size, seed)[mine])
        step += 1
