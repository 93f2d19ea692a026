"""What an export keeps: errors of its tensors by kind, and of the probabilities that a model computes from them.

Two checkpoints are compared without ever holding both: tensors one at a time; logits through the reference's last
states, which are small, and its head, which stays.

Shape legend: N rows, S tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..configuration import DeepseekV3Config
from ..data import IGNORE_INDEX
from ..evaluation.estimates import ratio_of_sums
from ..evaluation.text import TextRows
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM

KINDS = (
    *("embeddings", "attention", "dense MLP", "shared experts", "routed experts", "router", "norms", "head"),
    *("MTP", "MTP norms"),
)
MOST_NATS = 700.0  # e to a higher power is no float
MLP_KINDS = {"gate": "router", "shared_experts": "shared experts", "experts": "routed experts"}


class Tensors(Protocol):
    """Official tensors that are read one at a time: a `Source`, or a GGUF file."""

    names: list[str]
    config: DeepseekV3Config

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def is_quantized(self, name: str) -> bool: ...


def tensor_kind(name: str, config: DeepseekV3Config) -> str:
    """Which of `KINDS` an official tensor belongs to. All of an MTP layer is "MTP", but its norms and routing bias."""
    parts = name.split(".")
    small = "norm" in parts[-2] or parts[-2] in ("enorm", "hnorm")
    if parts[0] != "model":  # lm_head, score
        return "head"
    if parts[1] != "layers":
        return "norms" if small else "embeddings"
    if int(parts[2]) >= config.num_hidden_layers:
        return "MTP norms" if small or parts[-1] == "e_score_correction_bias" else "MTP"
    if small:
        return "norms"
    return MLP_KINDS.get(parts[4], "dense MLP") if parts[3] == "mlp" else "attention"


def coverage(export: Tensors, reference: Tensors) -> dict[str, Any]:
    """`missing`, `unexpected` and `other_shape` tensors of an export, by name; `tensors`, the number it shares."""
    shared = set(export.names) & set(reference.names)
    return {
        "tensors": len(shared),
        "missing": [name for name in reference.names if name not in shared],
        "unexpected": [name for name in export.names if name not in shared],
        "other_shape": [
            f"{name}: {list(export.shape(name))}, not {list(reference.shape(name))}"
            for name in reference.names
            if name in shared and export.shape(name) != reference.shape(name)
        ],
    }


def tensor_errors(export: Tensors, reference: Tensors, names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Relative errors by kind, `||export - reference|| / ||reference||` over all tensors of a kind.

    Returns:
        kind -> `tensors`, `parameters`, `relative_error`, `largest` with the tensor it is the error of, and the same
        of those that the export does not quantize (`largest_plain`; -1 without any); and the tensors of the export
        that hold an infinity or a NaN, which are in no error.

    Raises:
        ValueError: a tensor of the reference holds one.
    """
    kinds: dict[str, dict[str, Any]] = {}
    squares: dict[str, np.ndarray] = {}
    non_finite = []
    for name in names:
        expected = reference.read(name).float()
        if not expected.isfinite().all():
            raise ValueError(f"{name} of the reference: found numbers that are not finite, allowed is none such")
        found = export.read(name)
        if not found.isfinite().all():
            non_finite.append(name)
            continue
        size = _square(expected)
        error = _square(found.float().sub_(expected))
        kind = tensor_kind(name, reference.config)
        row = kinds.setdefault(kind, {"tensors": 0, "parameters": 0, "largest": -1.0, "largest_plain": -1.0})
        row["tensors"] += 1
        row["parameters"] += expected.numel()
        squares[kind] = squares.get(kind, np.zeros(2)) + (error, size)
        own = _root(error, size)
        for largest in ("largest",) if export.is_quantized(name) else ("largest", "largest_plain"):
            if own > row[largest]:
                row |= {largest: own, f"{largest}_tensor": name}
    for kind, row in kinds.items():
        row["relative_error"] = _root(*squares[kind])
    return {kind: kinds[kind] for kind in KINDS if kind in kinds}, non_finite


def _square(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _root(error: float, size: float) -> float:
    return math.sqrt(error / size) if size else math.sqrt(error)


@dataclass(frozen=True)
class ReferenceStates:
    """A model's answer to a text, in little memory: what its head made logits of, and the head.

    Attributes:
        states: `[N, S, H]` on the CPU, in the model's dtype.
    """

    states: torch.Tensor
    head: nn.Module


@torch.no_grad()
def reference_states(model: DeepseekV3ForCausalLM, rows: TextRows) -> ReferenceStates:
    """ValueError if a logit is not finite, which nothing can be compared with."""
    model.eval()
    states = []
    for batch in rows.batches():
        ids = batch["input_ids"].to(model.device)
        found = model.model(ids, use_cache=False).last_hidden_state
        if not all(model.lm_head(row).isfinite().all() for row in found):  # logits of one row
            raise ValueError(f"the reference's logits are not finite, from {first_non_finite(model, ids)} on")
        states.append(found.cpu())
    return ReferenceStates(torch.cat(states), model.lm_head)


@torch.no_grad()
def compare_logits(model: DeepseekV3ForCausalLM, reference: ReferenceStates, rows: TextRows) -> dict[str, Any]:
    """How the probabilities of every predicted token of the text differ from the reference's.

    Returns:
        `kl` (mean KL(reference || model), nats per token), `top1` (share of tokens whose likeliest prediction is the
        same), `bits_per_byte` with `reference`, `export` and `delta`, `perplexity_change` (relative); each with an
        interval over the rows. If a log-probability is not finite: only `non_finite`, where it arises first.
    """
    model.eval()
    sums: dict[str, list[float]] = {name: [] for name in ("kl", "same", "before", "after", "tokens")}
    row = 0
    for batch in rows.batches():
        ids = batch["input_ids"].to(model.device)
        states = model.model(ids, use_cache=False).last_hidden_state
        targets = batch["labels"][:, 1:].to(model.device)
        for own, other, target in zip(states, reference.states[row:], targets, strict=False):  # logits of one row
            predicted = target != IGNORE_INDEX
            found = model.lm_head(own[:-1][predicted]).float().log_softmax(-1)
            if not found.isfinite().all():
                return {"non_finite": first_non_finite(model, ids)}
            expected = reference.head(other[:-1].to(model.device)[predicted]).float().log_softmax(-1)
            label = target[predicted][:, None]
            sums["kl"].append(float((expected.exp() * (expected - found)).sum(dtype=torch.float64)))
            sums["same"].append(float((expected.argmax(-1) == found.argmax(-1)).sum()))
            sums["before"].append(-float(expected.gather(1, label).sum(dtype=torch.float64)))
            sums["after"].append(-float(found.gather(1, label).sum(dtype=torch.float64)))
            sums["tokens"].append(float(predicted.sum()))
        row += len(ids)
    kl, same, before, after, tokens = (np.array(values) for values in sums.values())
    bits = math.log(2) * tokens * rows.bytes_per_token  # nats / this = bits per byte
    change = ratio_of_sums(after - before, tokens)
    return {
        "kl": ratio_of_sums(kl, tokens),
        "top1": ratio_of_sums(same, tokens),
        "bits_per_byte": {
            "reference": ratio_of_sums(before, bits),
            "export": ratio_of_sums(after, bits),
            "delta": ratio_of_sums(after - before, bits),
        },
        "perplexity_change": {
            key: math.expm1(min(value, MOST_NATS)) if key != "n" and value is not None else value
            for key, value in change.items()
        },
    }


def first_non_finite(model: nn.Module, ids: torch.Tensor) -> str:
    """The first module, in the order of the forward pass over `ids`, whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors: Sequence[Any] = output if isinstance(output, tuple) else (output,)
            if any(isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "lm_head"
