"""The parameter groups of a recipe's optimizer, and the values of the learning-rate schedule."""

import math

import pytest
import torch
from torch import nn

from deepseek_v3.training.optimizer import build_optimizer, learning_rate
from deepseek_v3.training.recipe import Recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_matrices_decay(dtype: torch.dtype) -> None:
    shapes = [(6, 5), (7,), (3, 4, 2), (4, 4)]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=i < 3) for i, shape in enumerate(shapes)]
    optimizer = build_optimizer(params, Recipe(learning_rate=0.01, weight_decay=0.1))
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert len(optimizer.masters()) == 3
    for master in optimizer.masters():
        expected = 1 - 0.01 * 0.1 if master.dim() > 1 else 1.0
        torch.testing.assert_close(master.detach(), torch.full(master.shape, expected), rtol=1e-6, atol=0)
    assert torch.equal(params[3], torch.ones(4, 4, dtype=dtype))


def test_learning_rate() -> None:
    recipe = Recipe(learning_rate=0.4, warmup_steps=4, steps=12, min_lr_ratio=0.25)
    rates = [learning_rate(step, recipe) for step in range(13)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4)
    assert rates[6] == pytest.approx(0.1 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[8] == pytest.approx((0.4 + 0.1) / 2)  # half-way between peak and end
    assert rates[12] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_learning_rate_at_the_edges() -> None:
    flat = Recipe(learning_rate=0.4, warmup_steps=0, steps=5, min_lr_ratio=1.0)
    assert [learning_rate(step, flat) for step in range(5)] == [0.4] * 5
    assert learning_rate(0, Recipe(learning_rate=0.4, warmup_steps=0, steps=1)) == pytest.approx(0.4)
    only_warmup = Recipe(learning_rate=0.4, warmup_steps=8, steps=4)
    assert [learning_rate(step, only_warmup) for step in range(4)] == pytest.approx([0.05, 0.1, 0.15, 0.2])
