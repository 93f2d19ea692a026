import itertools

import numpy as np
import pytest
import torch

from deepseek_v3.data import batch_indices, iterate_batches, pack_documents, sample_order


@pytest.fixture
def dataset():
    return pack_documents([range(2, 90), range(90, 120)], 4, bos_id=0, eos_id=1)


def take(n, batches):
    return list(itertools.islice(batches, n))


def test_order_is_a_permutation_and_fixed_for_all_time():
    order = sample_order(10, 7, 0)
    assert sorted(order) == list(range(10)) and not order.flags.writeable
    # Written down: a run resumed with a later NumPy must not see another order.
    assert order.tolist() == [6, 3, 4, 9, 0, 2, 8, 7, 5, 1]
    assert not np.array_equal(order, sample_order(10, 7, 1)) and not np.array_equal(order, sample_order(10, 8, 0))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_batches_walk_through_the_epochs(batch_size):
    n = 29
    seen = np.concatenate([batch_indices(n, step, batch_size, seed=3) for step in range(3 * n // batch_size + 2)])
    expected = np.concatenate([sample_order(n, 3, epoch) for epoch in range(len(seen) // n + 1)])
    assert np.array_equal(seen, expected[: len(seen)])


def test_resuming_at_a_step_continues_the_same_batches(dataset):
    run = take(20, iterate_batches(dataset, 6, seed=1))
    resumed = take(9, iterate_batches(dataset, 6, seed=1, start_step=11))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(run[11:], resumed, strict=True) for key in a)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_in_order_are_the_global_batch(dataset, world_size):
    whole = take(8, iterate_batches(dataset, 6, seed=1))
    shares = [take(8, iterate_batches(dataset, 6, seed=1, rank=r, world_size=world_size)) for r in range(world_size)]
    for step, batch in enumerate(whole):
        for key in ("input_ids", "position_ids", "labels"):
            assert torch.equal(batch[key], torch.cat([share[step][key] for share in shares]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, 2\), found 2"),
        ({"world_size": 4}, "batch_size must be a multiple of world_size 4, found 6"),
    ],
)
def test_bad_ranks_fail_at_the_call(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        iterate_batches(dataset, 6, **arguments)


def test_bad_indices_are_named():
    with pytest.raises(ValueError, match="found n_rows=5, batch_size=2, step=-1, seed=0"):
        batch_indices(5, -1, 2, 0)
