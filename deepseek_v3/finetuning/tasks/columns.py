"""The user's own data: the kind of task is told by the names of the columns."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from ...data import Row, read_rows
from ...data.sources import check_unicode
from .fields import label_of, text_of
from .task_data import SPLITS, Kind, TaskData, TaskRow, build_task, opening_of, split_by_hash

ROLES = ("system", "user", "assistant", "tool")


def own_data(
    source: str, seed: int, limit: int | None, *, positive: str | int | None = None, text_answers: bool = False
) -> TaskData:
    """Rows of files, a folder or ``"datasets:NAME"`` (see `data.read_rows`), by the first of these that it has:

    ``messages`` (chat), ``prompt`` and ``completion`` (chat), ``text`` and ``label`` (classification), ``text``.
    Other columns are not used. Splits are those of the files' names. What they lack is cut from the training rows by
    the hash of the text, or of the prompt up to the user's first turn (`split_by_hash`). A lone text is cut at line
    breaks into 80, 10 and 10 %.

    Args:
        positive: of two classes, the one whose sensitivity matters; default: the later one in the alphabet.
        text_answers: conversations must end with a text, which can be scored; otherwise they may end with tool calls.

    Raises:
        ValueError: naming file and row of a missing column, an empty text or a malformed message; labels that differ
            only in the space around them.
    """
    read = read_rows(source)
    first = next(iter(read.splits.values()))[0]
    kind, to_row = _kind(first)
    splits = {split: [to_row(row) for row in rows] for split, rows in read.splits.items()}
    if text_answers and kind == "chat":
        for split, rows in read.splits.items():
            for row, made in zip(rows, splits[split], strict=True):
                _check_answer(row, made)
    notes = [f"left out, names tell no split: {', '.join(read.left_out)}"] if read.left_out else []
    pool = splits.pop("all", None)
    missing = [split for split in SPLITS if split not in splits and split != "train"]
    if pool is not None and kind == "text" and len(pool) == 1:
        splits = _cut_text(pool[0]["text"], source)
        notes.append("one text, cut at line breaks: the first 80 % train, then 10 % validation, 10 % test")
    elif missing:
        splits.update(split_by_hash(pool or splits["train"], opening_of, seed, source, missing))
        opening = "prompt up to the user's first turn" if kind == "chat" else "text"
        notes.append(f"{' and '.join(missing)} drawn by SHA-256 of the {opening}, seed {seed}")
    labels = _labels(splits, None if positive is None else str(positive), source) if kind == "classification" else None
    if cases := _alike(labels or (), str.casefold):
        notes.append(f"labels {cases} differ only in case and are classes of their own")
    return build_task(
        source, kind, splits, labels=labels, licence=read.licence, source=source, notes=notes, seed=seed, limit=limit
    )


def _kind(row: Row) -> tuple[Kind, Callable[[Row], TaskRow]]:
    columns = row.fields
    if "messages" in columns:
        return "chat", _messages_row
    if "prompt" in columns and "completion" in columns:
        return "chat", _prompt_row
    if "text" in columns:
        return ("classification", _labelled_row) if "label" in columns else ("text", _text_row)
    raise ValueError(
        f"{row.where}: expected the columns messages, prompt and completion, text and label, or text; "
        f"found {sorted(columns)}"
    )


def _text_row(row: Row) -> TaskRow:
    return {"text": text_of(row, "text")}


def _labelled_row(row: Row) -> TaskRow:
    return {"text": text_of(row, "text"), "label": label_of(row, "label")}


def _prompt_row(row: Row) -> TaskRow:
    if isinstance(row.fields["prompt"], list) and isinstance(row.fields["completion"], list):
        parts = {column: _messages(row, column) for column in ("prompt", "completion")}
        if parts["completion"][-1]["role"] != "assistant":
            raise ValueError(f"{row.where}: completion must end with the assistant's answer")
        return parts
    return {column: text_of(row, column) for column in ("prompt", "completion")}


def _messages_row(row: Row) -> TaskRow:
    if "messages" not in row.fields:
        raise ValueError(f"{row.where}: column 'messages' not found; found {sorted(row.fields)}")
    messages = _messages(row, "messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(f"{row.where}: messages must end with the assistant's answer to something")
    return {"messages": messages}


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    messages = row.fields[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{row.where}: column {column!r} must be a list of messages, found {messages!r:.60}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{row.where}: message {number}: role must be one of {', '.join(ROLES)}: {message!r:.60}")
        content = message.get("content")
        if message.get("tool_calls"):
            content = content or "calls"  # null in the common form
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{row.where}: message {number}: content must be text, found {content!r:.60}")
        check_unicode(json.dumps(message, ensure_ascii=False), f"{row.where}: message {number}, as JSON")
    return messages


def _check_answer(row: Row, made: TaskRow) -> None:
    parts = made["messages"] if "messages" in made else made["completion"]
    content = parts if isinstance(parts, str) else parts[-1].get("content")
    if not content:
        raise ValueError(f"{row.where}: the last message must hold text for its score, found {content!r:.60}")


def _labels(splits: dict[str, list[TaskRow]], positive: str | None, source: str) -> tuple[str, ...]:
    labels = sorted({row["label"] for rows in splits.values() for row in rows})
    if spaced := _alike(labels, str.strip):
        problem = "differ only in the space around them; allowed is one spelling of a class"
        raise ValueError(f"{source}: labels {spaced} {problem}")
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        labels.sort(key=int)  # so that the number of a class is its place
    if len(labels) < 2:
        raise ValueError(f"{source}: a classification needs at least two labels, found {labels}")
    if positive is not None:
        if len(labels) != 2 or positive not in labels:
            raise ValueError(f"{source}: positive must be one of two labels, found {positive!r} for {labels}")
        labels.sort(key=lambda label: label == positive)
    return tuple(labels)


def _alike(labels: Iterable[str], form: Callable[[str], str]) -> str:
    """Those of the labels that are equal in `form`, in words: ``'a', 'a '; 'b', ' b'``; empty where none are."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(form(label), []).append(label)
    return "; ".join(", ".join(map(repr, group)) for group in groups.values() if len(group) > 1)


def _cut_text(text: str, source: str) -> dict[str, list[TaskRow]]:
    ends = [text.rfind("\n", 0, int(len(text) * share)) + 1 for share in (0.8, 0.9)]
    parts = [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]]
    if not all(part.strip() for part in parts):
        raise ValueError(f"{source}: too few lines to cut into training, validation and test text")
    return {split: [{"text": part}] for split, part in zip(SPLITS, parts, strict=True)}
