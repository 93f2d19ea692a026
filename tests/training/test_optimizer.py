"""MasterAdamW against plain AdamW in fp32, and the values of the learning-rate schedule."""

import math

import pytest
import torch
from torch import nn

from deepseek_v3.training.optimizer import MasterAdamW, learning_rate
from deepseek_v3.training.recipe import Recipe

RECIPE = Recipe(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix, a norm, a stack of experts and one that is frozen; their values are bf16 numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (7,), (3, 4, 2), (4, 4)]
    tensors = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return [nn.Parameter(tensor, requires_grad=index < 3) for index, tensor in enumerate(tensors)]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)


def reference(params: list[nn.Parameter]) -> torch.optim.AdamW:
    decays = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in params if p.requires_grad]
    return torch.optim.AdamW(decays, lr=0.01, betas=(0.8, 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masters_follow_fp32_adamw(dtype: torch.dtype) -> None:
    """Also where a weight is bf16: its master is what AdamW would have made of an fp32 weight."""
    ours, plain = parameters(dtype), parameters()
    start = [p.detach().clone() for p in plain]
    optimizer, expected = MasterAdamW(ours, RECIPE), reference(plain)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(plain, step)
        rate = 0.01 * (1 + step % 3)
        for group in (*optimizer.inner.param_groups, *expected.param_groups):
            group["lr"] = rate
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in (*ours, *optimizer.masters))
    assert len(optimizer.masters) == 3
    for master, weight, value in zip(optimizer.masters, ours, plain, strict=False):
        assert master.dtype == torch.float32 and (master is weight) == (dtype == torch.float32)
        torch.testing.assert_close(master, value, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight, master.to(dtype)) and weight.dtype == dtype
    assert torch.equal(ours[3].float(), start[3])
    assert not torch.equal(plain[0], start[0])


def test_updates_below_the_spacing_of_bf16_add_up() -> None:
    """At 1 bf16 steps by 1/128: 100 updates of 0.0005 must move the weight by 0.05, and none of them shows alone."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], Recipe(learning_rate=0.0005, weight_decay=0.0))
    for step in range(100):
        weight.grad = torch.full((4,), 3.0, dtype=torch.bfloat16)
        optimizer.step()
        if step == 0:
            assert (weight == 1).all()
    torch.testing.assert_close(optimizer.masters[0].detach(), torch.full((4,), 0.95), rtol=0, atol=1e-4)
    assert (weight == torch.tensor(0.95).bfloat16()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_matrices_decay(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    start = [p.detach().clone() for p in params]
    optimizer = MasterAdamW(params, RECIPE)
    for param in params[:3]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for master, before in zip(optimizer.masters, start, strict=False):
        factor = 1 - 0.01 * 0.1 if before.dim() > 1 else 1.0
        torch.testing.assert_close(master.detach(), before.float() * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forget", [None, "adamw", "masters"])
def test_state_round_trip_is_bitwise(tmp_path, dtype: torch.dtype, forget: str | None) -> None:
    """Through a file, as in training; the control leaves half of the state out and must differ."""
    first = parameters(dtype)
    optimizer = MasterAdamW(first, RECIPE)
    for step in range(3):
        set_gradients(first, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in first]
    resumed = MasterAdamW(second, RECIPE)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if forget:
        state[forget] = resumed.state_dict()[forget]
    resumed.load_state_dict(state)
    for step in range(3, 6):
        for params, stepper in ((first, optimizer), (second, resumed)):
            set_gradients(params, step)
            stepper.step()
    same = [torch.equal(a, b) for a, b in zip(optimizer.masters, resumed.masters, strict=True)]
    harmless = forget is None or (forget == "masters" and dtype == torch.float32)  # there the weights are the masters
    assert all(same) if harmless else not any(same)
    if harmless:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
