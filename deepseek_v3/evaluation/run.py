"""`evaluate`: every figure of a checkpoint, in one record that a model card can read."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..configuration import DeepseekV3Config, num_parameters
from ..configuration.local_paths import public_name
from ..durable import file_sha256, write_json
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from ..modeling_deepseek_v3.weight_files import read_json, scan_folder
from ..process import environment, peak_memory, reset_peak_memory, say
from ..tokenization import check_vocab, load_tokenizer
from .harness import harness_results
from .speed import mtp_acceptance, throughput
from .text import LENGTH, TextRows, check_count, read_text, text_anchors, text_results, text_rows

RECORD = "evaluation.json"


def evaluate(
    checkpoint: str | Path,
    *,
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    lm_eval_tasks: Sequence[str] = (),
    limit: int | None = None,
    length: int = LENGTH,
    anchors: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a checkpoint and write `evaluation.json` into its folder, beside the figures that it already has there.

    Figures of other weights are not kept. Those that are not finite are left out.

    Args:
        checkpoint: a folder in any format that `from_pretrained` loads; a language model or a sequence classifier.
        text: sources of `evaluation.read_text`; a language model without any gets ``stdlib``.
        tasks: as `evaluation.tasks.choose_task` takes them (needs the extras of `finetuning`).
        task_options, max_length: of each of the tasks, as in a fine-tuning recipe. What is not given is as in the
            folder's `run.json`, if that is of a fine-tuning on the task.
        lm_eval_tasks: as `evaluation.harness.harness_results` takes them (needs the extra `eval`).
        limit: at most this many rows of each text, drawn by `seed`, and of each split of a task; None takes all, or
            what that `run.json` says.
        length: tokens per row of a text.
        anchors: also measure what the model has to beat: gzip, a 5-gram model, classical baselines.

    Returns:
        The record, JSON-ready: `text`, `tasks`, `lm_eval` (name -> figures with `n` and interval), `files` (SHA-256 of
        the weights' files), `parameters`, and of this call `throughput`, `peak_memory_bytes`, `environment`, `date`.

    Raises:
        ValueError: no such folder, an adapter, text or harness tasks for a classifier, a task that does not fit, rows
            of a task that are not those of the folder's `run.json`, two sources of one name, a `limit` or `max_length`
            below 1, weights that are not finite, a tokenizer with more tokens than the model; after the rest is
            written, figures that are not finite.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        kind = "an adapter: merge it first" if (folder / "adapter_config.json").is_file() else "no checkpoint"
        raise ValueError(f"{folder}: {kind}; allowed is a folder with config.json and weights")
    check_count("limit", limit)
    check_count("max_length", max_length)
    chosen: dict[str, Any] = {}
    if tasks:
        from .tasks import choose_task, split_name, task_results  # needs peft and scikit-learn

        named: dict[str, str] = {}
        for task in tasks:
            _add(named, "task", task, public_name(split_name(task)[0]), task)
        for name, task in named.items():
            chosen[name] = choose_task(folder, task, options=task_options, limit=limit, max_length=max_length)
    elif task_options:
        raise ValueError(f"task_options: found {', '.join(task_options)}, allowed with tasks only")
    logging.disable_progress_bar()
    config = DeepseekV3Config.from_pretrained(folder)
    classifier = "DeepseekV3ForSequenceClassification" in (config.architectures or ())
    if classifier and (text or lm_eval_tasks):
        raise ValueError(f"{folder}: a classifier; text and lm-eval tasks need a language model")
    tokenizer = load_tokenizer(folder)
    check_vocab(tokenizer, config.vocab_size)
    record = _begin(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak_memory(device)
    cls = DeepseekV3ForSequenceClassification if classifier else DeepseekV3ForCausalLM
    model = cls.from_pretrained(folder, device_map={"": device}).eval()
    _check_finite(model, folder)

    scored: dict[str, TextRows] = {}
    for source in () if classifier else text or ("stdlib",):
        rows = text_rows(read_text(source), tokenizer, min(length, config.max_position_embeddings), limit, seed)
        _add(scored, "text", source, rows.text.name, rows)
    found: dict[str, dict[str, Any]] = {"text": {}, "tasks": {}, "lm_eval": {}}
    for name, rows in scored.items():
        say(f"text {name}: {len(rows.chosen)} rows")
        acceptance = mtp_acceptance(model, rows.prompts())
        found["text"][name] = {**text_results(model, rows), "seed": seed, "mtp_acceptance": acceptance}
    if scored:
        record["throughput"] = throughput(model, next(iter(scored.values())).prompts(1)[0])
        record["peak_memory_bytes"] = peak_memory(device)  # the model's; the anchors' comes after it
    for name, rows in scored.items() if anchors else ():
        found["text"][name]["anchors_bits_per_byte"] = text_anchors(rows, tokenizer)
    for name, rows_of in chosen.items():
        say("; ".join([f"task {name}: {len(rows_of.data.test)} rows", *rows_of.notes]))
        found["tasks"][name] = task_results(model, tokenizer, rows_of, anchors=anchors)
    if lm_eval_tasks:
        found["lm_eval"] = harness_results(model, tokenizer, lm_eval_tasks, limit)
    if not scored:
        record["peak_memory_bytes"] = peak_memory(device)
    counted = num_parameters(config)  # packed weights count as what they stand for
    further = sum(p.numel() for p in model.score.parameters()) - counted.head if classifier else counted.mtp
    record["parameters"] = counted.total + further
    record |= {"environment": environment(device), "date": time.strftime("%Y-%m-%d")}
    left_out = _take(record, found)
    write_json(folder / RECORD, record, allow_nan=False)
    if left_out:
        raise ValueError(f"{folder / RECORD}: left out: {'; '.join(left_out)}")
    return record


def _add(sources: dict[str, Any], kind: str, source: str, name: str, content: Any) -> None:
    if name in sources:
        raise ValueError(f"{kind} {source!r}: found a second one called {name!r}; allowed is one")
    sources[name] = content


def _begin(folder: Path) -> dict[str, Any]:
    """A record with the figures that were measured before of the same weights."""
    path, files = folder / RECORD, sorted({entry.file for entry in scan_folder(folder).values()})
    digests = {file.name: file_sha256(file) for file in files}
    before: Any = read_json(path) if path.is_file() else None
    same = isinstance(before, dict) and before.get("files") == digests
    if before is not None:
        say(f"{path}: {'adds to the figures of the same weights' if same else 'is not of these weights, begins anew'}")
    figures = {kind: before.get(kind, {}) if same else {} for kind in ("text", "tasks", "lm_eval")}
    return {"checkpoint": folder.resolve().name, "files": digests, **figures}


def _check_finite(model: torch.nn.Module, folder: Path) -> None:
    for name, tensor in model.named_parameters():
        if tensor.element_size() > 1 and not tensor.isfinite().all():  # not of codes, whose figures would tell
            raise ValueError(f"{folder}: found numbers that are not finite in {name}; nothing was measured")


def _take(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    """Put the figures `found` into `record`, and say in words what is left out because it is not finite."""
    left_out = []
    for kind, every in found.items():
        for name, results in every.items():
            if broken := list(_not_finite(results)):
                left_out.append(f"{kind} {name}: {', '.join(broken)}")
                continue
            if record[kind].get(name, results).get("sha256") != results.get("sha256"):
                say(f"{kind} {name}: replaces the figures of other data of this name")
            record[kind][name] = results
    return left_out


def _not_finite(results: Any, name: str = "") -> Iterator[str]:
    if isinstance(results, dict | list):
        for key, value in results.items() if isinstance(results, dict) else enumerate(results):
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(results, float) and not math.isfinite(results):
        yield f"{name} is {results}"
