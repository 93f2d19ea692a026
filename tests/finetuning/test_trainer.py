"""The trainer's parts alone, and that neither accumulation nor recomputation changes a step."""

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.finetuning import finetune, load_task
from deepseek_v3.finetuning.build import build_model
from deepseek_v3.finetuning.evaluate import evaluate_task
from deepseek_v3.finetuning.examples import make_examples
from deepseek_v3.finetuning.run import _trainer
from deepseek_v3.finetuning.trainer import (
    AdaptiveLearningRate,
    Clock,
    EpochOrder,
    FinetuneTrainer,
    classification_loss,
    warmup_cosine,
)
from tests.finetuning.runs import recipe
from tests.finetuning.test_unfreezing import tiny_model

# --- the learning rate


class Rates:
    """An optimizer as the callback sees it; the scheduler sets the rate anew before each step."""

    def step(self, callback: AdaptiveLearningRate, norm: float) -> float:
        self.param_groups = [{"lr": 1.0}, {"lr": 0.5}]
        callback.grad_norm = norm
        callback.on_pre_optimizer_step(None, None, None, optimizer=self)
        first, second = (group["lr"] for group in self.param_groups)
        assert second == first / 2
        return first


def evaluated(callback: AdaptiveLearningRate, *losses: float) -> AdaptiveLearningRate:
    for loss in losses:
        callback.on_evaluate(None, None, None, metrics={"eval_loss": loss})
    return callback


def test_the_rate_halves_after_an_evaluation_without_progress() -> None:
    callback, rates = AdaptiveLearningRate(), Rates()
    factors = [rates.step(evaluated(callback, loss), 1.0) for loss in (3.0, 2.0, 2.0, 1.9, 2.5, 1.95, 1.0)]
    assert factors == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
    assert rates.step(evaluated(callback, *[2.0] * 9), 1.0) == 1 / 16  # and no lower
    callback.on_evaluate(None, None, None, metrics={"eval_runtime": 1.0})
    assert rates.step(evaluated(AdaptiveLearningRate(), math.nan, math.nan), 1.0) == 1 / 2


def test_an_outlying_gradient_counts_a_tenth() -> None:
    callback, rates = AdaptiveLearningRate(spike=4.0), Rates()
    assert [rates.step(callback, norm) for norm in [1.0] * 9] == [1.0] * 9
    assert rates.step(callback, 100.0) == 1.0  # nothing is known yet of what is usual
    assert rates.step(callback, 3.9) == 1.0 and rates.step(callback, 4.1) == pytest.approx(0.1)
    assert rates.step(evaluated(callback, 1.0, 1.0), 50.0) == pytest.approx(0.05)  # with the factor of the evaluations
    for _ in range(60):
        rates.step(callback, 20.0)
    assert rates.step(callback, 60.0) == 0.5 and rates.step(callback, 81.0) == pytest.approx(0.05)  # usual by now


def test_what_it_remembers_survives_a_resume() -> None:
    callback, rates = evaluated(AdaptiveLearningRate(spike=3.0), 2.0, 2.5), Rates()
    for norm in range(1, 12):
        rates.step(callback, float(norm))
    state = callback.state()
    restored = AdaptiveLearningRate(**state["args"])
    for name, value in state["attributes"].items():
        setattr(restored, name, value)
    for norm in (5.0, 17.0, 19.0):
        assert rates.step(restored, norm) == rates.step(callback, norm)
    assert evaluated(restored, 2.0).factor == evaluated(callback, 2.0).factor == 0.25


def test_it_acts_in_a_run(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rate reaches the optimizer, of which the schedule's is the base again in the next step, and the history."""
    seen: list[float] = []
    scheduled: list[float] = []

    class Halved(AdaptiveLearningRate):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            assert self.grad_norm > 0
            self.factor = 1 / 2 if state.global_step < 3 else 1 / 4
            scheduled.append(optimizer.param_groups[0]["lr"])
            super().on_pre_optimizer_step(args, state, control, optimizer, **kwargs)

        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr("deepseek_v3.finetuning.run.AdaptiveLearningRate", Halved)
    began = time.monotonic()
    record = finetune(recipe(base, data / "two", tmp_path, adaptive_lr=True))
    assert 0 < record["train_seconds"] <= record["total_seconds"] <= time.monotonic() - began + 0.1
    rates = [row["learning_rate"] for row in record["history"] if "learning_rate" in row]
    assert rates == seen and len(seen) == 4
    factor = warmup_cosine(1, 4, 0.1)
    assert scheduled == pytest.approx([0.01 * factor(step) for step in range(4)])
    assert seen == pytest.approx([rate * part for rate, part in zip(scheduled, (0.5, 0.5, 0.5, 0.25), strict=True)])


def test_the_schedule() -> None:
    factor = warmup_cosine(4, 24, 0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    values = [factor(step) for step in range(4, 25)]
    assert values[0] == 1 and values[10] == pytest.approx(0.55) and values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True) and factor(99) == pytest.approx(0.1)
    assert warmup_cosine(0, 1, 0.0)(0) == 1


def test_the_clock_counts_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 17.0, 200.0, 205.0, 300.0])
    monkeypatch.setattr("deepseek_v3.finetuning.trainer.time", SimpleNamespace(monotonic=lambda: next(now)))
    first = Clock()  # training begins at 10 and is saved at 17
    first.on_train_begin(None, None, None)
    state = first.state()
    second = Clock(**state["args"])
    for name, value in state["attributes"].items():
        setattr(second, name, value)
    second.on_train_begin(None, None, None)
    second.on_train_end(None, None, None)
    assert second.seconds == 7 + 5  # and what comes after training is none of it
    assert next(now) == 300


# --- the order of the rows


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_depends_on_seed_and_epoch_alone(grouped: bool) -> None:
    lengths = [i % 23 for i in range(200)] if grouped else None
    orders = {}
    for seed in (0, 1):
        for epoch in range(3):
            order = EpochOrder(200, seed, 8, lengths)
            order.epoch = epoch
            orders[seed, epoch] = list(order)
            torch.rand(3)
            assert list(order) == orders[seed, epoch] and len(order) == 200
            assert sorted(orders[seed, epoch]) == list(range(200))
    assert len({tuple(order) for order in orders.values()}) == 6
    if lengths is not None:
        steps = [[lengths[i] for i in orders[0, 0][start : start + 8]] for start in range(0, 200, 8)]
        assert sum(max(step) - min(step) for step in steps) / len(steps) < 4


def test_every_row_is_seen_once_an_epoch_in_the_same_steps(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without micro-batches."""
    steps: dict[str, list[Counter[tuple[int, ...]]]] = {}
    compute = FinetuneTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        if model.training:
            rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
            found = steps.setdefault(self.args.output_dir, [])
            while len(found) <= self.state.global_step:
                found.append(Counter())
            found[-1].update(tuple(i for i, real in zip(ids, mask, strict=True) if real) for ids, mask in rows)
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", record)
    for micro in (None, 2):
        finetune(recipe(base, data / "two", tmp_path / str(micro), micro_batch_size=micro))
    one, two = steps.values()
    assert one == two and [sum(step.values()) for step in one] == [8] * 4
    assert one[0] + one[1] == one[2] + one[3] and one[0] != one[2]


# --- what must not change a step


def figures(record: dict[str, Any]) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in record["history"] if "loss" in row]


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("two", {"batch_size": 6}),  # the last step of an epoch has four rows only
        ("messages", {"batch_size": 6, "mtp": "trained"}),
    ],
    ids=["classification", "chat"],
)
def test_accumulation_and_recomputation_change_nothing(
    base: Path, data: Path, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Losses and gradients; behind Adam gradients that are a multiple of the right ones would not show."""
    variants = {"plain": {}, "micro": {"micro_batch_size": 2}, "checkpointing": {"gradient_checkpointing": True}}
    found = {
        name: finetune(recipe(base, data / kind, tmp_path / name, grad_clip=1e6, **changes, **more))
        for name, more in variants.items()
    }
    expected = figures(found["plain"])
    for name in ("micro", "checkpointing"):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(figures(found[name]), expected, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-4) and norm == pytest.approx(wanted_norm, rel=1e-3)


def test_the_loss_of_a_classifier() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    whole = classification_loss(SimpleNamespace(logits=logits), labels)
    torch.testing.assert_close(whole, F.cross_entropy(logits, labels))
    parts = [
        classification_loss(SimpleNamespace(logits=logits[rows]), labels[rows], 6)
        for rows in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_no_logits_are_made_of_conversations(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation neither; of the largest vocabularies they would take more memory than the model."""
    seen: set[tuple[bool, bool]] = set()
    forward = DeepseekV3ForCausalLM.forward

    def record(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None:
            seen.add((self.training, output.logits is None))
        return output

    monkeypatch.setattr(DeepseekV3ForCausalLM, "forward", record)
    finetune(recipe(base, data / "messages", tmp_path, method="full", max_steps=1))
    assert seen == {(True, True), (False, True)}


@pytest.mark.parametrize("kind", ["messages", "text", "two"])
def test_the_validation_loss_is_that_of_the_labels(
    base: Path, data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Whatever the micro-batches: rows differ in their number of labels, and the last batch is smaller."""
    task, length = load_task(data / kind), 20 if kind == "text" else 24
    losses = []
    for micro in (1, 2, 8):
        chosen = recipe(base, data / kind, tmp_path, micro_batch_size=micro, max_length=length, dtype="fp32")
        examples = make_examples(chosen, task, tokenizer)
        model = build_model(chosen, task, tokenizer, torch.device("cpu"))
        trainer, _ = _trainer(chosen, tmp_path, model, task, examples, tokenizer)
        losses.append(trainer.evaluate()["eval_loss"])
    assert len(examples.validation) not in (2, 4, 8) and losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    if kind != "two":
        report = evaluate_task(model, replace(task, test=task.validation), tokenizer, length)
        assert math.log(report["perplexity"]["value"]) == pytest.approx(losses[0], rel=1e-5)


# --- plain transformers


class Noted(TrainerCallback):
    """The experts after each step."""

    def __init__(self) -> None:
        self.experts: dict[int, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.experts[state.global_step] = model.model.layers[1].mlp.experts.gate_up_proj.detach().clone()


def plain_trainer(folder: Path, learning_rate: float) -> tuple[Trainer, Noted]:
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 48, (12, 10), generator=generator)]
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "max_steps": 3}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "label_names": ["labels"]}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    rate = {"learning_rate": learning_rate, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}
    noted = Noted()
    arguments = TrainingArguments(output_dir=str(folder), **every, **quiet, **best, **rate)
    return Trainer(tiny_model(), arguments, None, rows, rows[:4], callbacks=[noted]), noted


def test_plain_trainer_restores_the_experts(tmp_path: Path) -> None:
    """It reads a checkpoint's files without transformers' conversion of names: the experts are there one by one."""
    trainer, whole = plain_trainer(tmp_path, 0.5)
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 3  # at this rate it only gets worse
    experts = trainer.model.model.layers[1].mlp.experts
    files = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    for expert in range(4):
        parts = [files[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(experts.gate_up_proj[expert], torch.cat(parts))
        assert torch.equal(experts.down_proj[expert], files[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"])
    assert torch.equal(experts.gate_up_proj, whole.experts[1]) and not torch.equal(whole.experts[1], whole.experts[3])

    trainer, resumed = plain_trainer(tmp_path, 0.5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert list(resumed.experts) == [3] and torch.equal(resumed.experts[3], whole.experts[3])
