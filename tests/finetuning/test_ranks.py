"""Two processes with gradients averaged (gloo): a run is the run of one process with the same rows per step."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from deepseek_v3.finetuning import FinetuneRecipe, finetune
from deepseek_v3.finetuning.trainer import FinetuneTrainer
from tests.finetuning.runs import assert_same_weights, recipe, weights
from tests.training.helpers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
FULL = {"method": "full", "learning_rate": 3e-3}
# Stage 0 is the head and layer 2, stage 1 adds layer 1; layer 0 and the embedding never train.
STAGES = {"first_layers": 1, "layers_per_stage": 1, "advance": "steps", "every": 2, "stages": 2}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("two", "adapter", {"dropout": 0.0}),
    # fewer steps than an epoch: its last step has three rows, of which two ranks would make four
    "chat": ("messages", "adapter", {"mtp": "trained", "max_steps": 2}),
    "unfreezing": ("two", "model", {**FULL, "unfreezing": STAGES}),
}


def chosen(base: Path, data: Path, output: Path, variant: str, **changes: Any) -> FinetuneRecipe:
    kind, _, fields = VARIANTS[variant]
    return recipe(base, data / kind, output, **{"batch_size": 4, "max_steps": 6, **fields, **changes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_train_as_one(base: Path, data: Path, tmp_path: Path, variant: str) -> None:
    """16 rows in steps of four, one and a half epochs."""
    folder = VARIANTS[variant][1]
    expected = finetune(chosen(base, data, tmp_path / "one", variant))
    two = chosen(base, data, tmp_path / "two", variant)
    assert run_ranks(tmp_path / "ranks", lambda: finetune(two), seconds=100) == ["done"] * 2
    one, both = weights(tmp_path / "one" / folder), weights(tmp_path / "two" / folder)
    assert one.keys() == both.keys()
    for name, tensor in one.items():
        # a thirtieth of one step: Adam divides by the root of squares that can be next to nothing
        torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    if variant == "unfreezing":
        start = weights(base)
        moved, also = ({n for n in run if n not in start or not torch.equal(run[n], start[n])} for run in (both, one))
        assert moved == also
        layers = {name.split(".")[2] for name in moved if "layers." in name}
        assert layers == {"1", "2"} and "score.weight" in moved and "model.embed_tokens.weight" not in moved
    # the second call finds the run finished, in both ranks; so does one process
    assert run_ranks(tmp_path / "again", lambda: finetune(two), seconds=60) == ["done"] * 2
    record = finetune(two)
    losses = [[row["loss"] for row in each["history"] if "loss" in row] for each in (record, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    seen = [[row["eval_loss"] for row in each["history"] if "eval_loss" in row] for each in (record, expected)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_a_signal_to_one_rank_stops_both_and_resuming_is_bitwise(base: Path, data: Path, tmp_path: Path) -> None:
    """In the second epoch, with dropout and rows of unequal length: the ranks draw random numbers of their own."""
    options = {"dropout": 0.2, "max_steps": 8}
    whole = chosen(base, data, tmp_path / "whole", "lora", **options)
    part = chosen(base, data, tmp_path / "part", "lora", **options)
    clip = FinetuneTrainer._clip_grad_norm

    def stopped() -> None:
        def signal_rank_1(self: FinetuneTrainer, model: torch.nn.Module) -> Any:
            if self.state.global_step + 1 == 6 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return clip(self, model)

        FinetuneTrainer._clip_grad_norm = signal_rank_1  # in this process's child only
        finetune(part)

    assert run_ranks(tmp_path / "0", lambda: finetune(whole), seconds=100) == ["done"] * 2
    outcomes = run_ranks(tmp_path / "1", stopped, seconds=100)
    assert outcomes == ["InterruptedError: stopped at step 6 of 8, saved"] * 2
    assert run_ranks(tmp_path / "2", lambda: finetune(part), seconds=100) == ["done"] * 2
    assert_same_weights(tmp_path / "part" / "adapter", tmp_path / "whole" / "adapter")


def test_what_the_ranks_cannot_do_is_refused_in_all(base: Path, data: Path, tmp_path: Path) -> None:
    wrong = chosen(base, data, tmp_path / "run", "lora", batch_size=3)
    for outcome in run_ranks(tmp_path / "ranks", lambda: finetune(wrong), seconds=60):
        assert outcome.startswith("ValueError: recipe: batch_size is 3, allowed are multiples")


@pytest.mark.slow
def test_torchrun_trains_as_one_process(base: Path, data: Path, tmp_path: Path) -> None:
    """As a user starts it: two processes of the command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        fields = vars(chosen(base, data, tmp_path / name, "lora"))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        command = [sys.executable, *launcher, "-m", "deepseek_v3.cli", "finetune", str(tmp_path / f"{name}.yaml")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        assert done.stdout.count("this model") == 1
    one, two = (weights(tmp_path / name / "adapter") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert (tmp_path / "two" / "adapter" / "README.md").exists()
