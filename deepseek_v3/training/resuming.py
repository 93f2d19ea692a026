"""Whether a run may go on with what its folder holds: the same recipe, text and tokenizer, seen by every process."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ..data import Corpus
from ..process import all_ranks
from .recipe import Recipe

RECORD = "run.json"


def fixed_fields(recipe: Recipe) -> dict[str, Any]:
    """What may not change between the parts of one run."""
    free = ("output_dir", "log_every", "eval_every", "save_every", "keep_checkpoints", "compare", "micro_batch_size")
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in free}


def _difference(saved: dict[str, Any], recipe: Recipe) -> str | None:
    """The first field of `recipe` that may not change and differs from the saved one, in words."""
    for name, value in fixed_fields(recipe).items():
        if saved.get(name) != value:
            return f"{name} = {saved.get(name)!r}, the recipe has {value!r}"
    return None


def check_same(saved: dict[str, Any], corpus: Corpus, recipe: Recipe, where: Path) -> None:
    if difference := _difference(saved["recipe"], recipe):
        raise ValueError(f"{where}: saved with {difference}")
    if saved["corpus_sha256"] != corpus.sha256:
        raise ValueError(
            f"{where}: the text of {corpus.name} has changed since this state was saved (SHA-256 differs)"
        )


def check_same_tokenizer(saved: dict[str, Any], identity: dict[str, Any], where: Path) -> None:
    before = saved.get("tokenizer", identity)  # older states do not say
    if before != identity:
        raise ValueError(
            f"{where}: the tokenizer has changed since this state was saved: it was {before}, now it is {identity}"
        )


def check_shared(output: Path, progress: str) -> None:
    """Every process reads the run's `progress` from a disk of its own, or from one that all share."""
    found = all_ranks(progress)
    if len(set(found)) > 1:
        raise ValueError(
            f"{output}: the processes found {', '.join(found)}, allowed is the same in all: "
            "output_dir must be a folder that they share"
        )


def check_alike(recipe: Recipe, corpus: Corpus, identity: dict[str, Any]) -> None:
    """Every process reads recipe, text and tokenizer itself, and a batch is cut from what all of them have.

    Raises:
        ValueError: they do not have the same; names which.
    """
    mine = {"recipe": dataclasses.asdict(recipe), "text": corpus.sha256, "tokenizer": identity}
    every = all_ranks(mine)
    for name, value in every[0].items():
        if odd := [rank for rank, other in enumerate(every) if other[name] != value]:
            raise ValueError(
                f"{corpus.name}: processes {odd} have another {name} than process 0, allowed is the same in all"
            )


def read_record(output: Path, recipe: Recipe) -> dict[str, Any]:
    """The record of the finished run in `output`; {} if there is none."""
    path = output / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved = record["recipe"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no run's record ({type(error).__name__}: {error})") from None
    if difference := _difference(dict(saved), recipe):
        raise ValueError(f"{path}: a finished run with {difference}; use another output_dir")
    return record


def clear(output: Path, everything: bool) -> None:
    """Remove what a killed run left half-written, and with `everything` the run itself."""
    for leftover in output.glob(".*.tmp-*"):
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    if not everything:
        return
    for name in (RECORD, "metrics.jsonl"):  # first: a record without its model would be that of a finished run
        (output / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tokenizer", "model"):
        shutil.rmtree(output / name, ignore_errors=True)
