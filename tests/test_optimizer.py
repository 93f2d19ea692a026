"""MasterAdamW against torch's AdamW in fp32."""

import pytest
import torch
from torch import nn

from deepseek_v3.optimizer import MasterAdamW
from tests.training.helpers import without

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masters_follow_fp32_adamw(dtype: torch.dtype) -> None:
    """Also where a weight is bf16: its master is what AdamW would have made of an fp32 weight."""
    ours, plain = parameters(dtype), parameters()
    start = [p.detach().clone() for p in plain]
    optimizer, expected = MasterAdamW(ours[:3], **OPTIONS), torch.optim.AdamW(plain[:3], **OPTIONS)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(plain, step)
        rate = 0.01 * (1 + step % 3)
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["lr"] = rate
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in (*ours, *optimizer.masters()))
    assert len(optimizer.masters()) == 3
    for master, weight, value in zip(optimizer.masters(), ours, plain, strict=False):
        assert master.dtype == torch.float32 and (master is weight) == (dtype == torch.float32)
        torch.testing.assert_close(master, value, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight, master.to(dtype)) and weight.dtype == dtype
    assert torch.equal(ours[3].float(), start[3])
    assert not torch.equal(plain[0], start[0])


def test_updates_below_the_spacing_of_bf16_add_up() -> None:
    """At 1 bf16 steps by 1/128: 100 updates of 0.0005 must move the weight by 0.05, and none of them shows alone."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=0.0005)
    for step in range(100):
        weight.grad = torch.full((4,), 3.0, dtype=torch.bfloat16)
        optimizer.step()
        if step == 0:
            assert (weight == 1).all()
    torch.testing.assert_close(optimizer.masters()[0].detach(), torch.full((4,), 0.95), rtol=0, atol=1e-4)
    assert (weight == torch.tensor(0.95).bfloat16()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forget", [None, "moments", "masters"])
def test_state_round_trip_is_bitwise(tmp_path, dtype: torch.dtype, forget: str | None) -> None:
    """Through a file, as in training; the control leaves half of the state out and must differ."""
    first = parameters(dtype)
    optimizer = MasterAdamW(first[:3], **OPTIONS)
    for step in range(3):
        set_gradients(first, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in first]
    resumed = MasterAdamW(second[:3], **OPTIONS)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if forget:
        state = without(state, forget)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        for params, stepper in ((first, optimizer), (second, resumed)):
            set_gradients(params, step)
            stepper.step()
    same = [torch.equal(a, b) for a, b in zip(optimizer.masters(), resumed.masters(), strict=True)]
    harmless = forget is None or (forget == "masters" and dtype == torch.float32)  # there the weights are the masters
    assert all(same) if harmless else not any(same)
    if harmless:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_layer_that_thaws_later_starts_then() -> None:
    """While it has no gradient it has no state and does not decay; the others go on as if it were not there."""
    ours, plain = parameters(torch.bfloat16)[:3], parameters()[:3]
    optimizer, expected = MasterAdamW(ours, **OPTIONS), torch.optim.AdamW(plain, **OPTIONS)
    for step in range(6):
        for params in (ours, plain):
            set_gradients(params, step)
            params[0].grad = params[0].grad if step >= 3 else None
        optimizer.step()
        expected.step()
        assert (ours[0] in optimizer.state) == (step >= 3)
    assert optimizer.state[ours[0]]["step"] == 3 and optimizer.state[ours[1]]["step"] == 6
    for master, value in zip(optimizer.masters(), plain, strict=True):
        torch.testing.assert_close(master, value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("saved", "now"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_state_of_weights_of_another_dtype_is_refused(saved: torch.dtype, now: torch.dtype) -> None:
    before, after = (MasterAdamW(parameters(dtype)[:3], **OPTIONS) for dtype in (saved, now))
    set_gradients([p for group in before.param_groups for p in group["params"]], 0)
    before.step()
    with pytest.raises(ValueError, match=f"parameter 0 is {now}, and its state is of "):
        after.load_state_dict(before.state_dict())
