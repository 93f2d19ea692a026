"""The tasks of fine-tuning, for a checkpoint as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..configuration.local_paths import public_name
from ..finetuning.baselines import classification_baselines
from ..finetuning.evaluate import classification_results, evaluate_task
from ..finetuning.examples import length_notes
from ..finetuning.recipe import NO_OPTIONS
from ..finetuning.tasks import TASKS, TaskData, load_task
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from ..modeling_deepseek_v3.weight_files import read_json
from ..process import say

MAX_LENGTH = 512  # tokens per row, as in a fine-tuning recipe
RUN = "run.json"  # of the run that made the checkpoint
UNKNOWN = (
    f"no {RUN} of a fine-tuning on this task: the split is that of its default options; a model that was fine-tuned "
    "with others has seen some of these rows"
)


class Chosen(NamedTuple):
    """A task to evaluate.

    Attributes:
        data: its rows; the test split is what a model is scored on.
        options: of `load_task`, that they were loaded with.
        max_length: tokens per row.
        notes: what else a reader of the figures has to know.
    """

    data: TaskData
    options: dict[str, Any]
    max_length: int
    notes: list[str]


class _Run(NamedTuple):
    """What the record of a fine-tuning run says of its rows."""

    options: dict[str, Any]
    limit: int | None
    max_length: int
    sha256: str


def split_name(task: str) -> tuple[str, str | None]:
    """``NAME=PATH`` of one of `finetuning.TASKS` as name and path; any other text is a name alone.

    >>> split_name("pubmedqa=/data"), split_name("/data/day=1/rows.csv")
    (('pubmedqa', '/data'), ('/data/day=1/rows.csv', None))
    """
    name, separator, path = task.partition("=")
    return (name, path) if separator and name in TASKS else (task, None)


def choose_task(
    folder: Path,
    task: str,
    *,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    max_length: int | None = None,
) -> Chosen:
    """The rows to score the checkpoint in `folder` on: if it was fine-tuned on this task, those of its run.

    Args:
        task: one of `finetuning.TASKS`, with ``NAME=PATH`` where its data have to be given, or the user's own rows.
        options, limit, max_length: of the task, as in a recipe; what is not given is as in the `run.json` of a
            fine-tuning on this task in `folder`, else the default.

    Raises:
        ValueError: data that cannot be read, an option that the task has not, or rows that are not those of the run:
            of another split the model has seen some.
    """
    given = dict(options or {})
    if named := [name for name in given if name in NO_OPTIONS]:
        raise ValueError(f"task_options: found {', '.join(named)}, allowed are options of the task, as in a recipe")
    name, path = split_name(task)
    run = _recorded(folder / RUN, public_name(name))
    if run is None:
        data = load_task(name, path, limit=limit, **given)
        return Chosen(data, given, max_length or MAX_LENGTH, [] if given else [UNKNOWN])
    chosen = {**run.options, **given}
    data = load_task(name, path, limit=run.limit, **chosen)
    if data.sha256 != run.sha256:
        found = f"found other rows (SHA-256 {data.sha256}, task_options {chosen}) than the run's ({run.sha256}, "
        found += f"{run.options}): it may have been trained on some"
        allowed = "allowed are the run's, or other data under another name"
        raise ValueError(f"{folder / RUN}: task {public_name(name)}: {found}; {allowed}")
    if limit not in (None, run.limit):
        data = load_task(name, path, limit=limit, **chosen)
    return Chosen(data, chosen, max_length or run.max_length, [])


def _recorded(path: Path, task: str) -> _Run | None:
    """What the record says, if it is that of a fine-tuning on this task."""
    match read_json(path) if path.is_file() else None:
        case {
            "task": {"name": str(name), "sha256": str(sha256)},
            "recipe": {"task_options": dict(options), "limit": int() | None as limit, "max_length": int(max_length)},
        } if name == task:
            return _Run(options, limit, max_length, sha256)
    return None


def task_results(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, chosen: Chosen, *, anchors: bool = True
) -> dict[str, Any]:
    """Results on a task's test split, with `n` and intervals, as fine-tuning reports them.

    Args:
        anchors: also fit the classical baselines of a classification task on its training split.

    Raises:
        ValueError: a task that this checkpoint cannot do: classes need a head trained for exactly these classes, chats
            and texts a language model.
    """
    task = chosen.data
    _check(model, task)
    found = evaluate_task(model, task, tokenizer, chosen.max_length)
    left_out, truncated = ({"test": found.get(key, 0)} for key in ("n_left_out", "n_truncated"))
    notes = length_notes({"test": task.test}, left_out, truncated, chosen.max_length)
    for note in notes:
        say(f"  {note}")
    results: dict[str, Any] = {
        "kind": task.kind,
        "source": public_name(task.source),
        "licence": task.licence,
        "sha256": task.sha256,
        "notes": [*task.notes, *chosen.notes, *notes],
        "split": "test",
        "options": chosen.options,
        "max_length": chosen.max_length,
        **found,
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
