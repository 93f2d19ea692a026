"""The training loop: micro-batches, clipping, what is not finite, gradient checkpointing, a golden run."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.data import batch_indices
from deepseek_v3.optimizer import MasterAdamW
from deepseek_v3.training import Recipe, pretrain
from deepseek_v3.training.loop import NonFiniteError, StepResult, fit
from deepseek_v3.training.optimizer import build_optimizer
from tests.training.helpers import (
    fast_finish,
    same_weights,
    synthetic_data,
    tiny_model,
    tiny_recipe,
)


def train(
    recipe: Recipe,
    *,
    accelerator: Accelerator | None = None,
    on_step: Callable[[StepResult], bool] = lambda _: False,
    data=None,
    **model,
) -> tuple[DeepseekV3ForCausalLM, list[StepResult]]:
    """`fit` alone, on synthetic data."""
    net = tiny_model(**model).to(torch.bfloat16 if recipe.dtype == "bf16" else torch.float32)
    results: list[StepResult] = []

    def step(result: StepResult) -> bool:
        results.append(result)
        return on_step(result)

    data = synthetic_data(40) if data is None else data
    fit(net, build_optimizer(net.parameters(), recipe), data, recipe, accelerator or Accelerator(), step)
    return net, results


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fit_learns(tmp_path: Path, dtype: str) -> None:
    model, results = train(tiny_recipe(tmp_path, tmp_path, steps=30, dtype=dtype, learning_rate=0.01))
    assert [r.step for r in results] == list(range(30))
    first, last = results[0], results[-1]
    assert first.ce_loss == pytest.approx(math.log(64), rel=0.05)
    assert last.ce_loss < 0.75 * first.ce_loss and last.mtp_loss < 0.85 * first.mtp_loss
    assert first.tokens == 4 * 16 and first.learning_rate == pytest.approx(0.005)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}


def capture_gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, torch.Tensor]]:
    """The gradients of each step as the optimizer receives them, unclipped where the recipe's limit is high."""
    found: list[dict[int, torch.Tensor]] = []
    step = MasterAdamW.step

    def capture(self: MasterAdamW) -> None:
        parameters = (p for group in self.param_groups for p in group["params"])
        found.append({i: p.grad.clone() for i, p in enumerate(parameters)})
        step(self)

    monkeypatch.setattr(MasterAdamW, "step", capture)
    return found


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("even", [True, False])
def test_micro_batches_equal_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int, even: bool
) -> None:
    """Losses and gradients, with document boundaries that leave each row another number of predicted tokens too."""
    gradients = capture_gradients(monkeypatch)
    runs = []
    data = synthetic_data(40, even=even)
    for size in (None, micro):
        recipe = tiny_recipe(tmp_path, tmp_path, steps=2, micro_batch_size=size, grad_clip=1e6, learning_rate=1e-4)
        runs.append(train(recipe, data=data, seq_balance_coef=0.1 if even else 0.0)[1])
    predicted = {int((data[row]["labels"][1:] != -100).sum()) for row in range(len(data))}
    assert (len(predicted) == 1) == even
    for whole, parts in zip(*runs, strict=True):
        for name in ("ce_loss", "mtp_loss", "grad_norm", "loss"):
            assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5), name
        # a micro-batch enters it with its share of the predicted tokens, so only even ones give the same number
        assert parts.balance_loss == pytest.approx(whole.balance_loss, rel=1e-5) and (whole.balance_loss > 0) == even
        assert torch.equal(parts.counts, whole.counts)
    for one, two in zip(gradients[:2], gradients[2:], strict=True):
        for index, expected in one.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(two[index], expected, rtol=0, atol=max(2e-5 * scale, 1e-9))


def test_many_micro_batches_in_bf16_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same row over and over: a sum in bf16 falls behind."""
    gradients, norms = capture_gradients(monkeypatch), []
    data = synthetic_data(1, even=True)
    for rows, size in ((1, None), (256, 1)):
        recipe = tiny_recipe(
            tmp_path, tmp_path, steps=1, batch_size=rows, micro_batch_size=size, grad_clip=1e6, dtype="bf16"
        )
        norms.append(train(recipe, data=data)[1][0].grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    for index, expected in gradients[0].items():
        error = (gradients[1][index].float() - expected.float()).norm()
        assert error <= 0.005 * expected.float().norm() + 1e-9, index


def test_gradients_of_a_step_are_those_of_the_mean_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through the evaluated formula, so that a factor in the loop cannot hide behind AdamW."""
    gradients = capture_gradients(monkeypatch)
    data = synthetic_data(40, even=True)
    recipe = tiny_recipe(tmp_path, tmp_path, steps=1, micro_batch_size=1, grad_clip=1e6)
    train(recipe, data=data, num_nextn_predict_layers=0, seq_balance_coef=0.0)
    model = tiny_model(num_nextn_predict_layers=0, seq_balance_coef=0.0)
    batch = data.rows(batch_indices(len(data), 0, 4, seed=0))
    logits = model.train()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    in_groups = sorted(model.parameters(), key=lambda parameter: parameter.dim() <= 1)  # matrices first
    for index, parameter in enumerate(in_groups):
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[0][index], parameter.grad, rtol=0, atol=max(1e-4 * scale, 1e-9))


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = capture_gradients(monkeypatch)
    _, results = train(tiny_recipe(tmp_path, tmp_path, steps=1, grad_clip=0.01))
    norm = torch.stack([g.norm() for g in gradients[0].values()]).norm()
    assert results[0].grad_norm > 1 and float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient", "infinite"])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    original = DeepseekV3ForCausalLM.forward
    calls: list[int] = []

    def broken(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 6:  # the second micro-batch of the third step
            if where == "gradient":
                output.loss.register_hook(lambda grad: grad * float("nan"))
            else:
                output.loss = output.loss * (float("inf") if where == "infinite" else float("nan"))
        return output

    monkeypatch.setattr(DeepseekV3ForCausalLM, "forward", broken)
    after: list[list[torch.Tensor]] = []
    model = tiny_model()
    recipe = tiny_recipe(tmp_path, tmp_path, micro_batch_size=2)

    def on_step(_: StepResult) -> bool:
        after.append([t.clone() for t in model.state_dict().values()])
        return False

    with pytest.raises(NonFiniteError, match=r"step 2: loss .*gradient norm .*not taken"):
        fit(model, build_optimizer(model.parameters(), recipe), synthetic_data(40), recipe, Accelerator(), on_step)
    assert len(calls) == 6 and len(after) == 2
    assert all(
        torch.equal(a, b) and a.isfinite().all() for a, b in zip(after[-1], model.state_dict().values(), strict=True)
    )


def test_a_run_that_is_not_finite_keeps_its_last_state(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path / "run", corpus, save_every=2)
    with monkeypatch.context() as patch:
        original = DeepseekV3ForCausalLM.forward
        calls: list[int] = []

        def broken(self, *args, **kwargs):
            calls.append(1)
            output = original(self, *args, **kwargs)
            if len(calls) == 4:
                output.loss = output.loss * float("nan")
            return output

        patch.setattr(DeepseekV3ForCausalLM, "forward", broken)
        with pytest.raises(NonFiniteError, match="step 3"):
            pretrain(recipe)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    pretrain(recipe)
    pretrain(tiny_recipe(tmp_path / "whole", corpus))
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, dropout: float) -> None:
    losses = []
    for checkpointed in (False, True):
        recipe = tiny_recipe(tmp_path, tmp_path, steps=3, learning_rate=1e-3)
        model = tiny_model(attention_dropout=dropout)
        if checkpointed:
            model.gradient_checkpointing_enable()
        results: list[StepResult] = []
        optimizer = build_optimizer(model.parameters(), recipe)
        fit(model, optimizer, synthetic_data(40), recipe, Accelerator(), lambda r, kept=results: kept.append(r))
        losses.append([(r.loss, r.grad_norm, r.counts.tolist()) for r in results])
    assert losses[0] == losses[1]


# Nothing is left to defaults, which may change.
GOLDEN_RECIPE = Recipe(
    preset="tiny",
    document_mask=True,
    batch_size=4,
    micro_batch_size=2,
    steps=20,
    learning_rate=0.003,
    warmup_steps=4,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    grad_clip=1.0,
    bias_update_until=0.9,
    dtype="fp32",
    seed=2,
)
# Its losses on an x86-64 CPU with torch 2.13. No choice of experts is a near tie: weights that
# differ by 1e-5 of themselves move no loss by more than 1e-4.
GOLDEN = [
    *(5.456481, 5.440717, 5.256368, 4.488596, 4.835789, 4.66319, 4.124284, 4.733158, 4.561058, 4.306808),
    *(3.709067, 3.435902, 3.168314, 3.342382, 3.452222, 3.101366, 3.286793, 2.75106, 2.952708, 2.995115),
]


def golden_model() -> DeepseekV3ForCausalLM:
    """Weights from NumPy's PCG64 words: torch is free to change its random numbers."""
    model = tiny_model(seq_balance_coef=0.01, bias_update_speed=0.01)
    stream = np.random.PCG64(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                words = stream.random_raw(parameter.numel()) >> np.uint64(40)
                uniform = torch.from_numpy(words.astype(np.float64) / 2**23 - 1).view_as(parameter)
                parameter.copy_(uniform * 1.5 / math.sqrt(parameter.shape[-1]))
    return model


def golden_losses(recipe: Recipe) -> list[float]:
    model = golden_model()
    losses: list[float] = []
    optimizer = build_optimizer(model.parameters(), recipe)
    fit(model, optimizer, synthetic_data(40), recipe, Accelerator(), lambda r: losses.append(r.loss))
    return losses


def test_golden_losses() -> None:
    """Model, losses, routing, optimizer, schedule and data order together, down to the fourth digit.

    What moves these numbers changes what every recipe trains: the changelog says so before new ones come here.
    """
    losses = golden_losses(GOLDEN_RECIPE)
    assert losses == pytest.approx(GOLDEN, rel=1e-4), [round(loss, 6) for loss in losses]
