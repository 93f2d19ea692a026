"""What several processes must agree on: settings, waiting, resting layers, one folder, one that evaluates."""

import copy
import os
import shutil
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from deepseek_v3.training import pretrain
from deepseek_v3.training.loop import fit
from deepseek_v3.training.monitor import Monitor
from deepseek_v3.training.optimizer import build_optimizer
from tests.training.helpers import (
    fast_finish,
    pretrain_module,
    run_ranks,
    signal_after,
    synthetic_data,
    tiny_model,
    tiny_recipe,
)


def test_the_launcher_s_saved_defaults_change_nothing_and_the_wait_is_long(tmp_path: Path) -> None:
    """Rank 0 evaluates and saves alone, for longer than the ten minutes after which NCCL gives up."""

    def job() -> None:
        os.environ.update(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_DYNAMO_BACKEND="EAGER")
        accelerator = pretrain_module.data_parallel()
        wrapped = accelerator.prepare(torch.nn.Linear(2, 2))
        assert isinstance(wrapped, DistributedDataParallel), wrapped  # and not compiled
        assert wrapped(torch.ones(1, 2)).dtype == torch.float32
        assert not hasattr(wrapped.module, "_original_forward")  # autocast
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout >= timedelta(hours=12), backend.options._timeout

    assert run_ranks(tmp_path, job, seconds=30) == ["done"] * 2


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_is_not_data_parallel_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=rf"distributed_type is {kind}, allowed are NO and MULTI_"):
        pretrain(tiny_recipe(tmp_path, corpus))


def test_fsdp_on_cpus_is_refused_too(tmp_path: Path, corpus: Path) -> None:
    """accelerate takes these settings there for MULTI_CPU."""

    def job() -> None:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        pretrain(tiny_recipe(tmp_path, corpus))

    for outcome in run_ranks(tmp_path / "ranks", job, seconds=30):
        assert outcome.startswith("ValueError: accelerate: distributed_type is FSDP, allowed are NO"), outcome


@pytest.mark.parametrize(("changed", "field"), [("text", "text"), ("steps", "recipe"), ("tokenizer", "tokenizer")])
def test_ranks_that_train_on_something_else(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, changed: str, field: str
) -> None:
    """Each reads its own files, and the batch is cut from what all of them have."""
    fast_finish(monkeypatch)
    other = shutil.copytree(corpus, tmp_path / "node1" / corpus.name)
    if changed == "text":
        (other / "d3.txt").unlink()
    read = pretrain_module.load_tokenizer

    def load_tokenizer(*arguments: Any) -> Any:
        tokenizer, identity = read(*arguments)
        return tokenizer, {**identity, "sha256": os.environ["RANK"] if changed == "tokenizer" else "0"}

    monkeypatch.setattr(pretrain_module, "load_tokenizer", load_tokenizer)

    def job() -> None:
        rank = int(os.environ["RANK"])
        os.chdir(other.parent if rank else corpus.parent)
        steps = 3 if rank and changed == "steps" else 2
        pretrain(tiny_recipe(tmp_path / "run", Path(corpus.name), steps=steps))

    for outcome in run_ranks(tmp_path / "ranks", job, seconds=30):
        assert outcome == (
            f"ValueError: {corpus.name}: processes [1] have another {field} than process 0, allowed is the same in all"
        )


def test_the_wrapper_goes_with_the_training(tmp_path: Path) -> None:
    """accelerate keeps what it prepared: a second model would lie beside the first."""
    recipe = tiny_recipe(tmp_path, tmp_path, steps=1)

    def job() -> None:
        model, accelerator = tiny_model(), pretrain_module.data_parallel()
        optimizer = build_optimizer(model.parameters(), recipe)
        fit(model, optimizer, synthetic_data(40), recipe, accelerator, lambda _: False)
        assert not accelerator._models

    assert run_ranks(tmp_path / "ranks", job, seconds=30) == ["done"] * 2


def test_mtp_layers_without_a_loss_rest(tmp_path: Path) -> None:
    """They get no gradient: data-parallel wrappers must not wait for one, and nothing may decay the weights."""
    recipe = tiny_recipe(tmp_path, tmp_path, steps=3, weight_decay=10.0)

    def job() -> None:
        model = tiny_model(mtp_loss_coef=0.0)
        before = copy.deepcopy(model)
        optimizer = build_optimizer(model.parameters(), recipe)
        accelerator = pretrain_module.data_parallel()
        assert fit(model, optimizer, synthetic_data(40), recipe, accelerator, lambda _: False) == 3
        for one, two in zip(model.mtp_layers[0].parameters(), before.mtp_layers[0].parameters(), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(model.model.layers[2].mlp.gate.weight, before.model.layers[2].mlp.gate.weight)

    assert run_ranks(tmp_path / "two", job, seconds=30) == ["done"] * 2
    assert run_ranks(tmp_path / "one", job, world_size=1, seconds=30) == ["done"]


def test_one_process_draws_and_evaluates(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path / "run", corpus, steps=3, eval_every=2, compare=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluated: list[int] = []
    monkeypatch.setattr(
        pretrain_module, "heldout_bits_per_byte", lambda *_, batch_size, **__: evaluated.append(batch_size) or 2.0
    )
    bars: dict[str, bool] = {}
    close = Monitor.close

    def note_bar(self: Monitor) -> None:
        bars[self.title] = not self.bar.disable
        close(self)

    monkeypatch.setattr(Monitor, "close", note_bar)

    def job() -> None:
        pretrain(recipe)
        first = dist.get_rank() == 0
        assert evaluated == ([2] * 3 if first else [])  # after step 2, at the end, of the twin: rows as in training
        assert bars == {"step": first, "dense": first}

    assert run_ranks(tmp_path / "ranks", job, seconds=60) == ["done"] * 2


@pytest.mark.parametrize(("stop", "progress"), [(1, "step-1, no saved state"), (None, "finished, not finished")])
def test_ranks_that_do_not_share_the_folder(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None, progress: str
) -> None:
    """Each would go on from what its own disk holds."""
    fast_finish(monkeypatch)
    nodes = [tiny_recipe(tmp_path / name, corpus, steps=2) for name in ("node0", "node1")]
    with monkeypatch.context() as patch:
        if stop:
            signal_after(patch, stop)
        with pytest.raises(InterruptedError) if stop else nullcontext():
            pretrain(nodes[0])
    outcomes = run_ranks(tmp_path / "ranks", lambda: pretrain(nodes[int(os.environ["RANK"])]), seconds=30)
    for node, outcome in zip(nodes, outcomes, strict=True):
        assert outcome.startswith(f"ValueError: {node.output_dir}: the processes found {progress}, allowed")
