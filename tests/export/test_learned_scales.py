import torch

from deepseek_v3.export import learned_scales
from deepseek_v3.export.gptq import Gptq, spread
from deepseek_v3.export.learned_scales import LearnedScales, reconstruct
from tests.export.test_gptq import correlated, output_error, weights


def row_errors(weight: torch.Tensor, quantized: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x.double() @ (quantized.double() - weight.double()).t()).square().sum(0)


def test_no_output_is_worse_than_gptqs_and_all_together_are_better() -> None:
    x, weight = correlated(1000, 128), weights(48, 128, torch.bfloat16)
    moment = x.t() @ x
    before, after = (
        row_errors(weight, codes * spread(scale, 128), x)
        for codes, scale in (Gptq(moment, 32)(weight), LearnedScales(moment, 32)(weight))
    )
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.97 * before.sum()


def test_keeps_to_the_grid() -> None:
    x, weight = correlated(300, 64), weights(16, 64, torch.bfloat16)
    codes, scale = LearnedScales(x.t() @ x, 32)(weight)
    assert scale.dtype == torch.bfloat16 and scale.shape == (16, 2) and (scale > 0).all()
    assert torch.equal(codes, codes.round()) and codes.min() >= -8 and codes.max() <= 7


def test_finds_the_scales_that_made_the_weight() -> None:
    """A weight that lies on a grid, and scales that are 8 % off."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (8, 64), generator=generator).float()
    true_scale = 0.1 + torch.rand(8, 2, generator=generator)
    weight, x, start = codes * spread(true_scale, 64), correlated(300, 64), true_scale * 1.08
    found, scale = reconstruct(weight, codes, start, x.t() @ x)
    torch.testing.assert_close(scale, true_scale, rtol=0.02, atol=0)
    error = output_error(weight, found * spread(scale, 64), x)
    assert error < 0.05 * output_error(weight, codes * spread(start, 64), x)


def test_without_steps_nothing_changes(monkeypatch) -> None:
    x, weight = correlated(300, 64), weights(8, 64)
    moment = x.t() @ x
    codes, scale = Gptq(moment, 32)(weight)
    monkeypatch.setattr(learned_scales, "STEPS", 0)
    same = reconstruct(weight, codes, scale, moment)
    assert torch.equal(same[0], codes) and torch.equal(same[1], scale)
    assert output_error(weight, codes * spread(scale, 64), x) > 0
