"""Runs that stop and go on: bit for bit as without the stop; what is refused, restarted, or left alone."""

import importlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.finetuning import finetune
from deepseek_v3.finetuning.trainer import FINISHED, newest_checkpoint
from tests.finetuning.runs import assert_same_weights, recipe, signal_after, weights

run_module = importlib.import_module("deepseek_v3.finetuning.run")

# 12 steps, four to the epoch (of conversations three); evaluated after every second step.
LONG = {"epochs": 3, "batch_size": 4, "evaluations_per_epoch": 2}
# Everything that a state has to carry: random numbers (dropout), accumulation, moments, stages, a remembered loss.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("two", "adapter", {"dropout": 0.2, "micro_batch_size": 2, "adaptive_lr": True, "patience": 6}),
    "nf4": ("messages", "adapter", {"quantize": "nf4", "dropout": 0.2, "mtp": "trained"}),
    "full": ("messages", "model", {"method": "full", "learning_rate": 3e-3, "dtype": "bf16"}),
    "head": ("three", "model", {"method": "head", "learning_rate": 1e-2}),
    "unfreezing": (
        "three",
        "model",
        {
            "method": "full",
            "learning_rate": 0.1,  # too high to make progress, so that the plateaus come
            "unfreezing": {"first_layers": 1, "layers_per_stage": 1, "advance": "plateau", "every": 2},
        },
    ),
}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock or the folder; a logged loss is the mean since the last line or the resume."""
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in record["history"]]
    kept = ("steps", "epochs", "test", "experts", "general_bits_per_byte", "trainable")
    return {"history": rows, **{name: record[name] for name in kept}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_bitwise(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    kind, folder, changes = VARIANTS[variant]
    whole = recipe(base, data / kind, tmp_path / "whole", **LONG, **changes, max_steps=12)
    expected = figures(finetune(whole))
    assert expected["steps"] == 12
    part = replace(whole, output_dir=str(tmp_path / "part"))
    for step in (5, 8):  # in the middle of the second epoch; at its end, or in the third
        with monkeypatch.context() as patch:
            signal_after(patch, step)
            with pytest.raises(InterruptedError, match=f"stopped at step {step} of 12, saved"):
                finetune(part)
        assert not (tmp_path / "part" / "run.json").exists()
    assert figures(finetune(part)) == expected
    assert_same_weights(tmp_path / "part" / folder, tmp_path / "whole" / folder)


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two classes without a stop."""
    output = tmp_path_factory.mktemp("whole")
    return output, finetune(recipe(base, data / "two", output, **LONG, dropout=0.2))


@pytest.fixture(scope="module")
def stopped(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped after step 5."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 5, signal.SIGINT)
        with pytest.raises(InterruptedError):
            finetune(recipe(base, data / "two", output, **LONG, dropout=0.2))
    return output


@pytest.fixture
def part(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run's folder."""
    return shutil.copytree(stopped, tmp_path / "part")


def test_a_half_written_checkpoint_is_not_used(
    base: Path, data: Path, part: Path, whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    checkpoints = part / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-5"}
    (checkpoints / "checkpoint-5" / FINISHED).unlink()  # as if the process had been killed while it wrote
    (checkpoints / "checkpoint-5" / "optimizer.pt").unlink()
    (checkpoints / "checkpoint-11").mkdir()
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    record = finetune(recipe(base, data / "two", part, **LONG, dropout=0.2))
    assert f"continuing from {checkpoints / 'checkpoint-4'}" in capsys.readouterr().out
    assert_same_weights(part / "adapter", whole[0] / "adapter")
    assert record["test"] == whole[1]["test"] and not checkpoints.exists()


def test_a_half_written_checkpoint_of_a_later_step_takes_the_place_of_no_other(
    base: Path, data: Path, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Trainer` keeps the newest two and the best: by their time, or where that says nothing by their step."""
    checkpoints = part / "checkpoints"
    late = (checkpoints / "checkpoint-5").rename(checkpoints / "checkpoint-8")
    (late / FINISHED).unlink()
    os.utime(late, (2**32, 2**32))
    signal_after(monkeypatch, 6)
    with pytest.raises(InterruptedError, match="stopped at step 6 of 12, saved"):
        finetune(recipe(base, data / "two", part, **LONG, dropout=0.2))
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-6" and not late.exists()


# The last step is inside an epoch; or a learning rate that is too high stops training early, after the best state.
@pytest.mark.parametrize("changes", [{"max_steps": 3}, {"learning_rate": 0.5, "epochs": 20, "patience": 2}], ids=str)
def test_a_run_killed_while_it_is_evaluated_trains_no_further(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Not in another folder either, and there it finds the best state again."""
    chosen = recipe(base, data / "two", tmp_path / "whole", **{**LONG, **changes})
    whole = finetune(chosen)
    losses = {row["step"]: row["eval_loss"] for row in whole["history"] if "eval_loss" in row}
    early = min(losses, key=losses.__getitem__) < whole["steps"] < 20 * 4
    assert early == (chosen.patience is not None)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(replace(chosen, output_dir=str(tmp_path / "run")))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    newest = newest_checkpoint(moved / "checkpoints")
    assert newest is not None and newest.name == f"checkpoint-{whole['steps']}"
    assert figures(finetune(replace(chosen, output_dir=str(moved)))) == figures(whole)
    assert_same_weights(moved / "adapter", tmp_path / "whole" / "adapter")


def test_a_folder_may_be_moved_and_other_free_fields_changed(
    base: Path, data: Path, part: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    moved = part.rename(tmp_path / "moved")
    free = {"micro_batch_size": 2, "merge": True, "gradient_checkpointing": True, "compare": True}
    record = finetune(recipe(base, data / "two", moved, **LONG, dropout=0.2, **free))
    assert record["steps"] == 12 and set(record["artifacts"]) == {"adapter", "merged"}
    assert record["recipe"]["compare"] and "majority" in record["baselines"]
    best = [row["eval_loss"] for row in record["history"] if "eval_loss" in row]
    assert best[:2] == [row["eval_loss"] for row in whole[1]["history"] if "eval_loss" in row][:2]


CHANGES = [
    *(("learning_rate", 0.02), ("seed", 1), ("rank", 8), ("targets", ["attention"]), ("epochs", 4.0)),
    *(("max_length", 32), ("dropout", 0.0), ("unfreezing", {"every": 2}), ("limit", 8), ("validation_rows", 3)),
]


@pytest.mark.parametrize("field, value", CHANGES, ids=[field for field, _ in CHANGES])
def test_a_changed_recipe_is_refused(
    base: Path, data: Path, stopped: Path, whole: tuple[Path, dict[str, Any]], field: str, value: Any
) -> None:
    for output, file in ((stopped, "recipe.json"), (whole[0], "run.json")):
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".lock"}
        with pytest.raises(ValueError, match=f"{output / file}: a run with {field} = ") as caught:
            finetune(recipe(base, data / "two", output, **{**LONG, "dropout": 0.2, field: value}))
        assert f"the recipe has {value!r}" in str(caught.value)
        assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_finished_run_is_not_repeated(
    base: Path, data: Path, whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    output, record = whole
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".lock"}
    chosen = recipe(base, data / "two", output, **LONG, dropout=0.2)
    assert finetune(chosen) == record and finetune(replace(chosen, micro_batch_size=1)) == record
    assert "this run is finished (12 steps); --restart trains it again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{output / 'run.json'}: a run with compare = False, the recipe has True"):
        finetune(replace(chosen, compare=True))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_restart_trains_again(base: Path, data: Path, part: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    (part / "merged").mkdir()  # of another recipe
    record = finetune(recipe(base, data / "two", part, **LONG, dropout=0.2, seed=1), restart=True)
    assert [row["step"] for row in record["history"] if "eval_loss" in row] == [2, 4, 6, 8, 10, 12]
    assert record["recipe"]["seed"] == 1 and set(record["artifacts"]) == {"adapter"}
    one, two = weights(part / "adapter"), weights(whole[0] / "adapter")
    assert all(not torch.equal(one[name], two[name]) for name in one if "lora_B" in name)


def test_a_restart_that_cannot_begin_removes_nothing(base: Path, data: Path, part: Path, tmp_path: Path) -> None:
    before = sorted(part.rglob("*"))
    for wrong in ({"micro_batch_size": 3}, {"layers": [9]}, {"general_text": str(tmp_path / "none")}):
        with pytest.raises(ValueError, match="micro_batch_size|layers|no such file"):
            finetune(recipe(base, data / "two", part, **{**LONG, **wrong}), restart=True)
    with pytest.raises(ValueError, match="no such task"):
        finetune(recipe(base, tmp_path / "mistyped", part, **LONG), restart=True)
    stages = {"targets": ["dense_mlp"], "unfreezing": {"first_layers": 1}}
    with pytest.raises(ValueError, match="unfreezing.first_layers is 1"):
        finetune(recipe(base, data / "messages", part, **LONG, **stages), restart=True)
    assert sorted(part.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true}', '{"finished": true, "recipe": 3}'])
def test_a_damaged_record_is_named(base: Path, data: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / "run.json")):
        finetune(recipe(base, data / "two", tmp_path))


def test_a_lost_recipe_is_named(base: Path, data: Path, part: Path) -> None:
    (part / "recipe.json").unlink()
    with pytest.raises(ValueError, match=str(part / "recipe.json")):
        finetune(recipe(base, data / "two", part, **LONG, dropout=0.2))


def test_training_stops_early_and_keeps_the_best_state(base: Path, data: Path, tmp_path: Path) -> None:
    chosen = recipe(base, data / "two", tmp_path, **{**LONG, "learning_rate": 0.5, "epochs": 20, "patience": 2})
    record = finetune(chosen)
    losses = {row["step"]: row["eval_loss"] for row in record["history"] if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert record["steps"] == best + 2 * 2 < 80 and max(losses) == record["steps"]
    shorter = replace(chosen, output_dir=str(tmp_path / "again"), patience=None)
    with pytest.MonkeyPatch.context() as patch:  # the state of the best step, from a run that is stopped there
        signal_after(patch, best)
        with pytest.raises(InterruptedError):
            finetune(shorter)
    at_best = tmp_path / "again" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    shutil.copytree(at_best.parent, tmp_path / "again" / "adapter")
    assert_same_weights(tmp_path / "adapter", tmp_path / "again" / "adapter")


def test_a_signal_during_the_last_step_lets_the_run_end(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_after(monkeypatch, 4)
    assert finetune(recipe(base, data / "two", tmp_path))["steps"] == 4
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
