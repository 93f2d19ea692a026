"""Tasks of lm-evaluation-harness, with our model plugged in. Most of them download their data from the Hub."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM

Z = 1.959964  # of a two-sided 95 % interval


def harness_results(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], limit: int | None = None
) -> dict[str, Any]:
    """Task -> `n`, `version` and its metrics, each with `value`, `low` and `high`.

    The interval is the harness' standard error times 1.96; None where the harness gives none.

    Args:
        names: tasks or groups by name, or YAML files of the user's own tasks.
        limit: at most this many items of each task.

    Raises:
        ValueError: lm-eval is not installed, or a task that it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"tasks of lm-evaluation-harness need lm-eval: pip install lm-eval ({error})") from error
    files = {name: Path(name) for name in names if Path(name).suffix in (".yaml", ".yml")}
    manager = TaskManager(include_path=sorted({str(file.parent) for file in files.values()}) or None)
    chosen = [name_in(files[name]) if name in files else name for name in names]
    if unknown := [name for name in chosen if name not in manager.all_tasks]:
        raise ValueError(f"lm-eval: no task {', '.join(unknown)} among its {len(manager.all_tasks)}")
    harness = HFLM(pretrained=model, tokenizer=tokenizer)
    output = simple_evaluate(harness, tasks=chosen, task_manager=manager, limit=limit, log_samples=False)
    results = {}
    for name, metrics in output["results"].items():
        counts = output["n-samples"].get(name)
        results[name] = {
            "n": counts["effective"] if counts else None,  # a group counts in its tasks
            "version": output["versions"].get(name),
            **_metrics(metrics),
        }
    return results


class _Loader(yaml.SafeLoader):
    """Takes what has a tag, such as lm-eval's `!function`, for nothing."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: None)


def name_in(file: Path) -> str:
    """The name of the task or group in a YAML file, whose functions are not loaded.

    Raises:
        ValueError: no YAML, or no name.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: found {type(content).__name__}, allowed is an object with a task or a group")
    found = [content.get(key) for key in ("task", "group")]  # a group's task is the list of its tasks
    names = [name for name in found if isinstance(name, str)]
    if not names:
        raise ValueError(f"{file}: found no name of a task or a group, only {', '.join(map(str, content))}")
    return names[0]


def _metrics(metrics: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    found = {}
    for key, value in metrics.items():
        metric, _, part = key.partition(",")
        if not isinstance(value, int | float) or not part or metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr,{part}")
        half = Z * error if isinstance(error, int | float) and math.isfinite(error) else None
        name = metric if part == "none" else f"{metric} ({part})"
        found[name] = {
            "value": value,
            "low": None if half is None else value - half,
            "high": None if half is None else value + half,
        }
    return found
