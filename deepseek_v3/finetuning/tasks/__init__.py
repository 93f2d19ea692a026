"""Tasks to fine-tune and evaluate on: two that pip installs, five for data given by path, and the user's own."""

import inspect
from collections.abc import Callable
from glob import has_magic
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ...data.sources import DATASETS_PREFIX
from .columns import own_data
from .credit import SENSITIVE, german_credit
from .finance import finance_iq, financial_phrasebank
from .medicine import chinese_medical_dialogue, icd10_chapter, medquad, pubmedqa
from .task_data import TaskData, TaskRow, prompt_of

TASKS: dict[str, Callable[..., TaskData]] = {
    "german-credit": german_credit,
    "icd10-chapter": icd10_chapter,
    "financial-phrasebank": financial_phrasebank,
    "financeiq": finance_iq,
    "pubmedqa": pubmedqa,
    "medquad": medquad,
    "chinese-medical-dialogue": chinese_medical_dialogue,
}

__all__ = ["SENSITIVE", "TASKS", "TaskData", "TaskRow", "load_task", "prompt_of"]


def load_task(
    name_or_path: str | PathLike[str],
    path: str | PathLike[str] | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    **options: Any,
) -> TaskData:
    """Load a task.

    Args:
        name_or_path: one of `TASKS`, or the user's own data: a file, folder, glob or ``"datasets:NAME"`` whose
            columns tell the kind (`columns.own_data`).
        path: the data of a named task; ``german-credit`` and ``icd10-chapter`` find theirs in pip packages.
        seed: of the split, where it is ours, and of `limit`.
        limit: at most so many rows of each split, drawn by hash.
        options: of the task: ``fold``, ``drop_sensitive`` (german-credit), ``agreement`` (financial-phrasebank),
            ``positive``, ``text_answers`` (own data).

    Raises:
        ValueError: unknown option, missing data or package, or a row that cannot be used, with file and row.
    """
    name = fspath(name_or_path)
    given = None if path is None else fspath(path)
    loader = TASKS.get(name)
    if loader is None:
        if given is not None:
            raise ValueError(f"unknown task {name!r}; tasks: {', '.join(TASKS)}; own data: load_task({given!r})")
        if not (name.startswith(DATASETS_PREFIX) or has_magic(name) or Path(name).exists()):
            raise ValueError(f"{name!r}: no such task, file or folder; tasks: {', '.join(TASKS)}")
    allowed = [p.name for p in inspect.signature(loader or own_data).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"task {name!r}: unknown options {unknown}; allowed: {allowed}")
    return own_data(name, seed, limit, **options) if loader is None else loader(given, seed, limit, **options)
