"""`evaluate`: every figure of a checkpoint, in one record that a model card can read."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from ..configuration import DeepseekV3Config, num_parameters
from ..durable import write_json
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from ..process import environment, say
from .harness import harness_results
from .speed import mtp_acceptance, peak_memory_bytes, throughput
from .text import LENGTH, TextRows, read_text, text_anchors, text_results, text_rows

RECORD = "evaluation.json"


def evaluate(
    checkpoint: str | Path,
    *,
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    lm_eval_tasks: Sequence[str] = (),
    limit: int | None = None,
    length: int = LENGTH,
    anchors: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a checkpoint and write `evaluation.json` into its folder.

    Args:
        checkpoint: a folder in any format that `from_pretrained` loads; a language model or a sequence classifier.
        text: sources of `evaluation.read_text`; a language model without any gets ``stdlib``.
        tasks: as `evaluation.tasks.task_results` takes them (needs the extras `train` and `peft`).
        lm_eval_tasks: as `evaluation.harness.harness_results` takes them (needs the extra `eval`).
        limit: at most this many rows of each text and each split of a task, drawn by `seed`.
        length: tokens per row of a text.
        anchors: also measure what the model has to beat: gzip, a 5-gram model, classical baselines.

    Returns:
        The record, JSON-ready: `text`, `tasks`, `lm_eval` (name -> figures with `n` and interval), `throughput`,
        `peak_memory_bytes`, `parameters`, `environment`.

    Raises:
        ValueError: no such folder, an adapter, text or harness tasks for a classifier, a task that does not fit.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        kind = "an adapter: merge it first" if (folder / "adapter_config.json").is_file() else "no checkpoint"
        raise ValueError(f"{folder}: {kind}; allowed is a folder with config.json and weights")
    logging.disable_progress_bar()
    config = DeepseekV3Config.from_pretrained(folder)
    classifier = "DeepseekV3ForSequenceClassification" in (config.architectures or ())
    if classifier and (text or lm_eval_tasks):
        raise ValueError(f"{folder}: a classifier; text and lm-eval tasks need a language model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cls = DeepseekV3ForSequenceClassification if classifier else DeepseekV3ForCausalLM
    model = cls.from_pretrained(folder, device_map={"": device}).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    record: dict[str, Any] = {"checkpoint": folder.name, "seed": seed, "limit": limit}
    record |= {"text": {}, "tasks": {}, "lm_eval": {}}
    scored: dict[str, TextRows] = {}
    for source in () if classifier else text or ("stdlib",):
        rows = text_rows(read_text(source), tokenizer, min(length, config.max_position_embeddings), limit, seed)
        if rows.text.name in scored:
            raise ValueError(f"text {source!r}: found a second one called {rows.text.name!r}; allowed is one")
        say(f"text {source}: {len(rows.chosen)} rows")
        results = {**text_results(model, rows), "mtp_acceptance": mtp_acceptance(model, rows.prompts())}
        record["text"][rows.text.name] = results
        scored[rows.text.name] = rows
    if scored:
        record["throughput"] = throughput(model, next(iter(scored.values())).prompts(1)[0])
        record["peak_memory_bytes"] = peak_memory_bytes(device)  # the model's; the anchors' comes after it
    for name, rows in scored.items() if anchors else ():
        record["text"][name]["anchors_bits_per_byte"] = text_anchors(rows, tokenizer)
    if tasks:
        from .tasks import task_results  # needs peft and scikit-learn

        for name in tasks:
            say(f"task {name}")
            called = name.partition("=")[0]
            record["tasks"][Path(called).name] = task_results(model, tokenizer, name, limit=limit, anchors=anchors)
    if lm_eval_tasks:
        record["lm_eval"] = harness_results(model, tokenizer, lm_eval_tasks, limit)
    record.setdefault("peak_memory_bytes", peak_memory_bytes(device))
    counted = num_parameters(config)  # packed weights count as what they stand for
    further = sum(p.numel() for p in model.score.parameters()) - counted.head if classifier else counted.mtp
    record["parameters"] = counted.total + further
    record |= {"environment": environment(device), "date": time.strftime("%Y-%m-%d")}
    write_json(folder / RECORD, record, allow_nan=False)
    return record
