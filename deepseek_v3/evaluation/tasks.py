"""The tasks of fine-tuning, for a checkpoint as it is."""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..configuration.local_paths import public_name
from ..finetuning.baselines import classification_baselines
from ..finetuning.evaluate import classification_results, evaluate_task
from ..finetuning.tasks import TaskData, load_task
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification

MAX_LENGTH = 512  # tokens per row, as in a fine-tuning recipe


def task_results(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    limit: int | None = None,
    anchors: bool = True,
    max_length: int = MAX_LENGTH,
) -> dict[str, Any]:
    """Results on a task's test split, with `n` and intervals, as fine-tuning reports them.

    Args:
        name: one of `finetuning.TASKS`, with ``NAME=PATH`` where its data have to be given, or the user's own rows.
        anchors: also fit the classical baselines of a classification task on its training split.

    Raises:
        ValueError: a task that this checkpoint cannot do: classes need a head trained for exactly these classes, chats
            and texts a language model.
    """
    task_name, separator, path = name.partition("=")
    task = load_task(task_name, path if separator else None, limit=limit)
    _check(model, task)
    results: dict[str, Any] = {
        "kind": task.kind,
        "source": public_name(task.source),
        "licence": task.licence,
        "sha256": task.sha256,
        "notes": list(task.notes),
        "split": "test",
        "max_length": max_length,
        **evaluate_task(model, task, tokenizer, max_length),
    }
    if anchors and task.kind == "classification" and task.train:
        results["baselines"] = {
            baseline.name: classification_results(task, baseline.validation, baseline.test)
            for baseline in classification_baselines(task)
        }
    return results


def _check(model: nn.Module, task: TaskData) -> None:
    if task.kind != "classification":
        if not isinstance(model, DeepseekV3ForCausalLM):
            raise ValueError(f"task {task.name}: a {task.kind} task needs a language model; this is a classifier")
        return
    if not isinstance(model, DeepseekV3ForSequenceClassification):
        raise ValueError(f"task {task.name}: this checkpoint has no classification head; fine-tune it")
    labels = tuple(model.config.id2label[number] for number in range(model.config.num_labels))
    if labels != task.labels:
        raise ValueError(f"task {task.name}: its classes are {task.labels}, the checkpoint's id2label has {labels}")
