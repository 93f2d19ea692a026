"""What a run shows and leaves while it goes: progress, `metrics.jsonl`, `loss.png`, `load.png`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from ..data import bits_per_byte
from ..durable import write_text
from ..process import first_rank, say
from .balance import LoadStatistics
from .loop import StepResult


class Monitor:
    """Averages over `every` steps go to `metrics.jsonl` and to the terminal (a bar there, plain lines elsewhere).

    Only the first rank shows them.

    Args:
        path: the metrics file; lines of steps from `start_step` on are dropped (a resumed run writes them again).
        bytes_per_token: of the training text, for bits per byte.
    """

    def __init__(self, path: Path | None, steps: int, start_step: int, every: int, bytes_per_token: float, title: str):
        self.path, self.every, self.bytes_per_token = path, every, bytes_per_token
        self.steps, self.step = steps, start_step
        self.window: list[StepResult] = []
        self.tokens = 0
        self.seconds = 0.0
        if path is not None:
            kept = [row for row in read_metrics(path) if row["step"] <= start_step]
            kept = [row for row in kept if "heldout_bits_per_byte" not in row]  # made again after the last step
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.title = title
        shown = first_rank() and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start_step, desc=title, unit="step", disable=not shown)
        self.clock = self.updated = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the same averages: plain values and tensors."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "window": [vars(result) for result in self.window],
            "window_seconds": self.updated - self.clock,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.window = [StepResult(**values) for values in state["window"]]
        self.clock = time.monotonic() - state["window_seconds"]

    def update(self, result: StepResult) -> None:
        self.bar.update(1)
        self.step = result.step + 1
        self.window.append(result)
        self.tokens += result.tokens
        if (result.step + 1) % self.every == 0 or result.step + 1 == self.steps:
            self._flush()
        self.updated = time.monotonic()

    def _flush(self) -> None:
        window, self.window = self.window, []
        elapsed = time.monotonic() - self.clock
        self.clock = time.monotonic()
        self.seconds += elapsed
        last = window[-1]
        row: dict[str, Any] = {"step": last.step + 1, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        for name in ("loss", "ce_loss", "mtp_loss", "balance_loss", "grad_norm"):
            row[name] = sum(getattr(r, name) for r in window) / len(window)
        row["bits_per_byte"] = bits_per_byte(row["ce_loss"] * 1e6, round(self.bytes_per_token * 1e6))
        row["learning_rate"] = last.learning_rate
        row["tokens_per_second"] = sum(r.tokens for r in window) / elapsed
        if last.counts.numel():
            # one global batch at a time, then averaged: the definition of the aux-loss-free paper
            loads = [LoadStatistics.of(r.counts) for r in window]
            row["max_violation"] = sum(s.max_violation for s in loads) / len(loads)
            window_load = LoadStatistics.of(torch.stack([r.counts for r in window]).sum(0))
            row |= {"load_cv": window_load.cv, "dead_experts": window_load.dead, "load_entropy": window_load.entropy}
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        parts = [f"ce {row['ce_loss']:.3f}", f"mtp {row['mtp_loss']:.3f}", f"bal {row['balance_loss']:.2f}"]
        parts += [f"{row['bits_per_byte']:.3f} bits/byte", f"{row['tokens_per_second']:.0f} tok/s"]
        if "max_violation" in row:
            parts += [f"MaxVio {row['max_violation']:.2f}", f"dead {row['dead_experts']:.0%}"]
        if self.bar.disable:
            say(f"{self.title} {row['step']:>6}/{self.steps}  " + "  ".join(parts))
        else:
            self.bar.set_postfix_str("  ".join(parts))

    def note(self, **values: float) -> None:
        """Write a line of evaluation results at the current step."""
        row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row | values) + "\n")
        self.clock += time.monotonic() - self.updated  # evaluation is not training time
        self.updated = time.monotonic()

    def close(self) -> None:
        self.bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a half-written last line (a killed run) is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_loss(path: Path, metrics: Sequence[dict[str, Any]], bars: dict[str, float]) -> None:
    """Training and held-out bits per byte over tokens, with horizontal lines for the baselines."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    train = [row for row in metrics if "ce_loss" in row]
    held = [row for row in metrics if "heldout_bits_per_byte" in row]
    axes.plot([r["tokens"] for r in train], [r["bits_per_byte"] for r in train], label="training", lw=1)
    axes.plot([r["tokens"] for r in held], [r["heldout_bits_per_byte"] for r in held], "o-", label="held-out")
    for i, (name, value) in enumerate(bars.items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + 2}", label=f"{name} {value:.3f}")
    axes.set(xlabel="tokens", ylabel="bits per byte")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_load(path: Path, metrics: Sequence[dict[str, Any]], counts: torch.Tensor, names: Sequence[str]) -> None:
    """Load of every expert relative to an even share in the last steps, and MaxVio over the run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    load = (counts / counts.double().mean(dim=1, keepdim=True).clamp(min=1e-12)).numpy()
    image = left.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    left.set(xlabel="expert", yticks=range(len(names)), title="load / even share, last steps")
    left.set_yticklabels(names, fontsize=8)
    figure.colorbar(image, ax=left)
    rows = [row for row in metrics if "max_violation" in row]
    right.plot([r["step"] for r in rows], [r["max_violation"] for r in rows])
    right.set(xlabel="step", title="MaxVio, mean over layers", ylim=(0, None))
    figure.savefig(path, dpi=120)
