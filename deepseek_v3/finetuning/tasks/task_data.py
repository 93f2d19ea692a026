"""What a fine-tuning task is: rows in three splits that share nothing, and where they come from."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TaskRow = dict[str, Any]
Kind = Literal["classification", "chat", "text"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskData:
    """A task in three splits.

    Attributes:
        name: of the task, or the source of the user's own data.
        kind: ``"classification"``: rows ``{"text", "label"}``; ``"chat"``: ``{"messages"}`` or ``{"prompt",
            "completion"}``; ``"text"``: ``{"text"}``. These are trl's conventions. A row may hold more:
            ``"group"``, what it shares with others (a disease, an ICD category), so that intervals resample groups;
            ``"attributes"`` and ``"sensitive"``, the table behind a sentence.
        train, validation, test: rows in the source's order. A task for evaluation only has an empty train.
        labels: class names; of two, the second is the positive one (the event: default, disease). None if no classes.
        licence: SPDX name or words, of the data; None where unknown.
        source: what was read, with the version of a package.
        sha256: over split and content of every row: equal hashes mean equal data.
        notes: how the splits were made, what repeats across them, cautions.
        costs: costs[true][predicted] of a decision, in the order of `labels`, where the task defines them.
    """

    name: str
    kind: Kind
    train: list[TaskRow]
    validation: list[TaskRow]
    test: list[TaskRow]
    labels: tuple[str, ...] | None
    licence: str | None
    source: str
    sha256: str
    notes: tuple[str, ...]
    costs: tuple[tuple[float, ...], ...] | None = None


def build_task(
    name: str,
    kind: Kind,
    splits: Mapping[str, Sequence[TaskRow]],
    *,
    source: str,
    licence: str | None,
    labels: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
    costs: tuple[tuple[float, ...], ...] | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> TaskData:
    """Cut each split to `limit` rows (drawn by hash and `seed`), report what repeats across the rest, and hash it.

    Raises:
        ValueError: `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    kept = {split: list(splits[split]) for split in SPLITS}
    if limit is not None:
        for split, rows in kept.items():
            numbers = [_number(_key(row), seed) for row in rows]
            drawn = sorted(range(len(rows)), key=numbers.__getitem__)[:limit]
            kept[split] = [rows[i] for i in sorted(drawn)]
    notes = [*notes, *_repetitions(kept)]
    if labels is not None and kept["train"]:
        unseen = sorted(set(labels) - {row["label"] for row in kept["train"]})
        notes += [f"classes without a training row: {unseen}"] if unseen else []
    if limit is not None:
        notes.append(f"at most {limit} rows of each split, of {', '.join(str(len(splits[s])) for s in SPLITS)}")
    total = hashlib.sha256()
    for split, rows in kept.items():
        for row in rows:
            total.update(hashlib.sha256(f"{split}\n{_key(row)}".encode()).digest())
    return TaskData(
        name, kind, **kept, labels=labels, licence=licence, source=source, sha256=total.hexdigest(),
        notes=tuple(notes), costs=costs,
    )  # fmt: skip


def split_by_hash(
    rows: Iterable[TaskRow],
    key: Callable[[TaskRow], str],
    seed: int,
    where: str,
    held_out: Collection[str] = ("validation", "test"),
) -> dict[str, list[TaskRow]]:
    """20 % test, 10 % validation, 70 % training by the SHA-256 of `key`, so that equal keys share a split.

    Neither the order of the rows nor rows added later move a row. The hash modulo 10 is 0 or 1 for test and 2 for
    validation, those of them that are in `held_out`; a seed other than 0 goes before the key.

    Raises:
        ValueError: a split came out empty; `where` names the data.
    """
    splits: dict[str, list[TaskRow]] = {split: [] for split in ("train", *held_out)}
    for row in rows:
        tenth = _number(key(row), seed) % 10
        drawn = "test" if tenth < 2 else "validation" if tenth == 2 else "train"
        splits[drawn if drawn in splits else "train"].append(row)
    for split, left in splits.items():
        if not left:
            n_rows = sum(map(len, splits.values()))
            raise ValueError(
                f"{where}: no row falls into the {split} split of {n_rows} rows; give more rows, another seed, "
                "or a folder with files named train, validation and test"
            )
    return splits


def stratified_folds(labels: Sequence[str], keys: Sequence[str], n_folds: int, seed: int) -> list[int]:
    """The fold of each item: every class is ordered by the hash of its keys and dealt out in turn.

    Fold sizes of a class differ by at most one, and the order of the items does not matter.
    """
    folds = [0] * len(labels)
    dealt: Counter[str] = Counter()
    for i in sorted(range(len(labels)), key=lambda i: _number(keys[i], seed)):
        folds[i] = dealt[labels[i]] % n_folds
        dealt[labels[i]] += 1
    return folds


def prompt_of(row: Mapping[str, Any]) -> str:
    """What the model is asked: the text, the prompt, or the messages before the last one, as one string."""
    return _text(_prompt(row))


def opening_of(row: Mapping[str, Any]) -> str:
    """Of the prompt the messages up to the first of the user's, so that rows from one dialogue share it."""
    prompt = _prompt(row)
    if not isinstance(prompt, str):
        roles = [message["role"] for message in prompt]
        prompt = prompt[: roles.index("user") + 1] if "user" in roles else prompt
    return _text(prompt)


def _prompt(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    if "messages" in row:
        return row["messages"][:-1]
    return row["prompt"] if "prompt" in row else row["text"]


def _text(part: str | list[dict[str, Any]] | None) -> str:
    return part if isinstance(part, str) else json.dumps(part, ensure_ascii=False, sort_keys=True)


def _number(key: str, seed: int) -> int:
    salted = key if seed == 0 else f"{seed}:{key}"
    return int(hashlib.sha256(salted.encode()).hexdigest(), 16)


def _key(row: TaskRow) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True)


def _answer(row: TaskRow) -> str:
    return _text(row["messages"][-1].get("content") if "messages" in row else row.get("completion", ""))


def _repetitions(splits: Mapping[str, Sequence[TaskRow]]) -> list[str]:
    """A note for each pair of splits in which the same row, prompt or answer of a chat occurs."""
    notes = []
    parts = {"rows": _key, "prompts": prompt_of, "answers": _answer}
    for what, part in parts.items():
        found = {split: [part(row) for row in splits[split]] for split in SPLITS}
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            seen = set(found[first]) - {""}
            if shared := sum(key in seen for key in found[second]):
                notes.append(f"{shared} {what} of {second} occur word for word in {first}")
    return notes
