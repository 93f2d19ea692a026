"""Tiny runs for the tests of training, the card and the command: corpora, recipes, forked ranks."""

import importlib
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset
from deepseek_v3.data import PackedDataset, pack_documents
from deepseek_v3.training import Recipe
from deepseek_v3.training.loop import StepResult
from deepseek_v3.training.monitor import Monitor

# the package's name `pretrain` is the function
pretrain_module = importlib.import_module("deepseek_v3.training.pretrain")
CLOCK = ("seconds", "tokens_per_second")


def write_corpus(folder: Path, documents: int = 14) -> Path:
    """Small text files of made-up words, of which some land in the held-out split."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(np.random.PCG64(7).random_raw(20_000).tolist())
    words = ["".join("abcdefghij"[next(numbers) % 10] for _ in range(2 + next(numbers) % 5)) for _ in range(120)]
    for index in range(documents):
        chosen = (words[next(numbers) % 120] for _ in range(60 + next(numbers) % 190))
        (folder / f"d{index}.txt").write_text(" ".join(chosen))
    return folder


def tiny_recipe(output: Path, corpus: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "output_dir": str(output),
        "data": str(corpus),
        "heldout_fraction": 0.3,
        "preset": "tiny",
        "model": {"vocab_size": 512},
        "sequence_length": 32,
        "batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 100,
        "save_every": 100,
        "dtype": "fp32",
        "compare": False,
    }
    return Recipe(**{**values, **changes})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def same_weights(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def fast_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what follows the training and takes most of a tiny run's time."""
    monkeypatch.setattr(pretrain_module, "write_samples", lambda *_: "")
    monkeypatch.setattr(
        pretrain_module, "mtp_acceptance", lambda *_: {"acceptance": 0.5, "tokens_per_forward": 1.5, "drafts": 2}
    )
    for name in ("plot_loss", "plot_load"):
        monkeypatch.setattr(pretrain_module, name, lambda path, *_: path.write_bytes(b""))


def signal_after(
    monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM, title: str = "step"
) -> None:
    """Send this process a signal while step `steps` of the model (or of the "dense" one) ends."""
    update = Monitor.update

    def patched(self: Monitor, result: StepResult) -> None:
        update(self, result)
        if result.step + 1 == steps and self.title == title:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Monitor, "update", patched)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what the clock says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def synthetic_data(rows: int, length: int = 16, vocab: int = 64, even: bool = False) -> PackedDataset:
    """Rows of learnable token ids, the same for every version of Python and NumPy.

    `even`: one document per row; otherwise documents of 5 to 24 tokens, packed.
    """
    numbers = np.random.PCG64(3).random_raw(rows * length)
    documents, start, left = [], 0, rows * length
    while left >= 3:
        size = min(length if even else 5 + int(numbers[start]) % 20, left)
        walk = np.cumsum(numbers[start : start + size - 2] % 3).astype(np.int64)
        documents.append(2 + (int(numbers[start]) % 7 + walk) % (vocab - 2))
        start, left = start + size, left - size
    return pack_documents(documents, length, bos_id=0, eos_id=1)


def tiny_model(**changes: Any) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(preset("tiny", **{"vocab_size": 64, **changes}))


def run_ranks(folder: Path, function: Callable[[], Any], world_size: int = 2, seconds: int = 120) -> list[str]:
    """Call `function` in `world_size` forked gloo processes; returns each one's outcome: "done" or its exception."""
    if torch.version.cuda:
        pytest.skip("forks: autograd of a CUDA build of torch refuses to run in a forked process")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _rank(folder / f"rank{rank}.txt", function, rank, world_size, port, seconds)
        children.append(child)
    limit = time.monotonic() + seconds + 10
    codes = []
    for child in children:
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > limit:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        codes.append(os.waitstatus_to_exitcode(done[1]))
    outcomes = [(folder / f"rank{rank}.txt") for rank in range(world_size)]
    return [p.read_text() if p.exists() else f"killed ({c})" for p, c in zip(outcomes, codes, strict=True)]


def _rank(outcome: Path, function: Callable[[], Any], rank: int, world_size: int, port: int, seconds: int) -> None:
    from accelerate.state import AcceleratorState

    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            function()
            text = "done"
        except BaseException as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        outcome.write_text(text)
    finally:
        os._exit(0)


def without(state: dict[str, Any], forgotten: str) -> dict[str, Any]:
    """An optimizer's state as it were had its `moments` (and their step) or its fp32 `masters` not been kept."""

    def value(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "master":
            return tensor.bfloat16().float() if forgotten == "masters" else tensor
        return torch.zeros_like(tensor) if forgotten == "moments" else tensor

    return state | {"state": {i: {k: value(k, v) for k, v in entry.items()} for i, entry in state["state"].items()}}
