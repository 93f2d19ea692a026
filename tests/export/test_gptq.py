"""GPTQ against the problem it solves: dense fp64 solutions input by input, and all roundings of few weights."""

import itertools

import pytest
import torch

from deepseek_v3.export import gptq
from deepseek_v3.export.gptq import Gptq, damped, inverse_factor, round_in_turn, search_scales, spread
from deepseek_v3.kernels.int4 import quantize_int4


def correlated(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Rows `[tokens, inputs]` whose inputs depend on each other and differ in size, as a model's activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 2, inputs, generator=generator) * torch.rand(inputs, generator=generator) ** 2 * 3
    noise = 0.05 * torch.randn(tokens, inputs, generator=generator)
    return torch.randn(tokens, inputs // 2, generator=generator) @ mixing + noise


def weights(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (quantized.double() - weight.double()).t()).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_searched_scales_are_the_best_of_the_grid(dtype: torch.dtype) -> None:
    weight = weights(3, 64, dtype)
    found = search_scales(weight, 32)
    assert found.dtype == dtype and found.shape == (3, 2)
    for row, group in itertools.product(range(3), range(2)):
        values = weight[row, 32 * group : 32 * group + 32].double()

        def error(scale: float, values=values) -> float:
            codes = (values / scale).round().clamp(-8, 7)
            return float((codes * scale - values).square().sum())

        widest = weight[row, 32 * group : 32 * group + 32].float().abs().max() / 7.5
        candidates = [float((widest * factor).to(dtype)) for factor in gptq.SHRINKAGE]
        assert error(float(found[row, group])) <= min(map(error, candidates)) * (1 + 1e-5)


def test_searched_scales_of_zeros() -> None:
    assert (search_scales(torch.zeros(2, 64), 32) > 0).all()


def test_factor_is_that_of_the_inverse() -> None:
    moment = damped(correlated(300, 48).t() @ correlated(300, 48))
    factor = inverse_factor(moment)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ moment, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", [128, 7, 1])
def test_rounds_what_is_best_given_the_inputs_before(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input k is rounded from the value that, with all inputs after it free, makes the output's error least. Here that
    value is solved for directly, with the normal equations of the free inputs."""
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, x = weights(5, 40).double(), correlated(200, 40)
    moment = damped(x.t() @ x)
    scale = spread(search_scales(weight.float(), 20), 40).double()
    expected, rounded = torch.empty_like(weight), weight.clone()
    for k in range(40):
        free, done = slice(k, 40), slice(0, k)
        shift = (rounded[:, done] - weight[:, done]) @ moment[done, free]
        best = weight[:, free] - torch.linalg.solve(moment[free, free], shift.t()).t()
        expected[:, k] = (best[:, 0] / scale[:, k]).round().clamp(-8, 7)
        rounded[:, k] = expected[:, k] * scale[:, k]
    found = round_in_turn(weight.clone(), scale, inverse_factor(moment))
    assert torch.equal(found, expected)


def test_lies_between_rounding_and_the_best_of_all_roundings() -> None:
    weight, x = weights(30, 4), correlated(100, 4)
    scale = search_scales(weight, 4)
    codes = round_in_turn(weight.clone(), spread(scale, 4), inverse_factor(damped(x.t() @ x)).float())
    ours = output_error(weight, codes * spread(scale, 4), x)
    grid = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)), dtype=torch.float64)
    best = sum(
        float(((grid * step - row.double()) @ x.double().t()).square().sum(-1).min())
        for row, step in zip(weight, scale.double(), strict=True)
    )
    nearest = (weight / scale).round().clamp(-8, 7) * scale
    assert best <= ours * (1 + 1e-9)
    assert ours < 0.6 * output_error(weight, nearest, x)
    assert ours < 5 * best


def test_beats_rounding_to_nearest() -> None:
    x, unseen = correlated(2000, 256), correlated(2000, 256, seed=0)[1000:]
    weight = weights(64, 256, torch.bfloat16)
    codes, scale = Gptq(x[:1000].t() @ x[:1000], 128)(weight)
    assert scale.dtype == torch.bfloat16 and scale.shape == (64, 2)
    assert torch.equal(codes, codes.round()) and codes.min() >= -8 and codes.max() <= 7
    packed, step = quantize_int4(weight, 128)
    nearest = (weight.float() / spread(step, 256)).round().clamp(-8, 7) * spread(step, 256)
    assert output_error(weight, codes * spread(scale, 256), unseen) < 0.2 * output_error(weight, nearest, unseen)


def test_order_of_the_inputs_does_not_matter_within_their_groups() -> None:
    """The inputs are rounded in the order of their power, wherever they stand."""
    x, weight = correlated(500, 64), weights(8, 64)
    shuffled = torch.cat([torch.randperm(32, generator=torch.Generator().manual_seed(3)) + 32 * i for i in range(2)])
    codes, scale = Gptq(x.t() @ x, 32)(weight)
    again, same_scale = Gptq((x.t() @ x)[shuffled][:, shuffled], 32)(weight[:, shuffled])
    torch.testing.assert_close(same_scale, scale)
    assert (again == codes[:, shuffled]).float().mean() > 0.99  # ties of fp32 sums aside


def test_inputs_that_were_always_zero_change_nothing_else() -> None:
    x, weight = correlated(500, 64), weights(8, 64)
    x[:, 40:] = 0
    codes, scale = Gptq(x.t() @ x, 64)(weight)
    assert codes.isfinite().all() and scale.isfinite().all()
    nearest = (weight / spread(scale, 64)).round().clamp(-8, 7)
    assert torch.equal(codes[:, 40:], nearest[:, 40:])


def test_without_any_input_weights_are_rounded_to_nearest() -> None:
    weight = weights(8, 64)
    codes, scale = Gptq(torch.zeros(64, 64), 32)(weight)
    assert torch.equal(scale, quantize_int4(weight, 32)[1])
    assert torch.equal(codes, (weight / spread(scale, 64)).round().clamp(-8, 7))
