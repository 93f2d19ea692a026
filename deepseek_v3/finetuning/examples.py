"""What of a task's rows is learned from: encoded, cut, packed, and counted where nothing is left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .batches import (
    Encoded,
    Row,
    conversation,
    cut,
    encode_chat,
    encode_classification,
    encode_text,
    pack,
    pad_classification,
    reasoning_of,
    stack,
)
from .recipe import FinetuneRecipe
from .tasks import TaskData
from .tasks.task_data import prompt_of


@dataclass(frozen=True)
class Examples:
    """What is learned from, and looked at while training.

    Attributes:
        train, validation: what `collate` makes batches of.
        tokens: of the training rows, without padding.
        left_out: split -> conversations that have nothing to learn within `max_length`; of the validation rows among
            those that are looked at.
        truncated: split -> rows of classes and other conversations that are longer than `max_length`, so that their
            end is cut off.
        notes: of both, and of reasoning that is not learned, in words.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    tokens: int
    left_out: dict[str, int]
    truncated: dict[str, int]
    notes: list[str]


def make_examples(recipe: FinetuneRecipe, task: TaskData, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Of classes rows as they are, of conversations and documents packed ones.

    Raises:
        ValueError: a split of which there is nothing to learn; the test split is one of them. A row that the chat
            template cannot write.
    """
    if not task.train:
        raise ValueError(f"task {task.name}: found no training rows; it can only be evaluated")
    order = np.random.default_rng(0).permutation(len(task.validation))[: recipe.validation_rows]
    splits = {"train": task.train, "validation": [task.validation[i] for i in sorted(order)], "test": task.test}
    length, pad_id = recipe.max_length, tokenizer.pad_token_id
    if task.labels is not None:
        encoded = {name: encode_classification(rows, tokenizer, task.labels, length) for name, rows in splits.items()}
        left_out = dict.fromkeys(splits, 0)
        truncated = {name: sum(row["truncated"] for row in rows) for name, rows in encoded.items()}
        return Examples(
            train=encoded["train"],
            validation=encoded["validation"],
            collate=lambda batch: pad_classification(batch, pad_id),
            tokens=sum(len(row["input_ids"]) for row in encoded["train"]),
            left_out=left_out,
            truncated=truncated,
            notes=length_notes(splits, left_out, truncated, length),
        )
    pieces = {name: pieces_of(rows, name, task, tokenizer, length) for name, rows in splits.items()}
    left_out = {name: count_left_out(of_rows, task, name, length) for name, of_rows in pieces.items()}
    flat = {name: [piece for of_row in of_rows for piece in of_row] for name, of_rows in pieces.items()}
    truncated = {name: sum(piece.truncated for piece in of_split) for name, of_split in flat.items()}
    return Examples(
        train=pack(flat["train"], length, pad_id),
        validation=pack(flat["validation"], length, pad_id),
        collate=stack,
        tokens=sum(len(piece.input_ids) for piece in flat["train"]),
        left_out=left_out,
        truncated=truncated,
        notes=length_notes(splits, left_out, truncated, length) + reasoning_notes(task, tokenizer),
    )


def length_notes(
    splits: Mapping[str, Sequence[Row]], left_out: Mapping[str, int], truncated: Mapping[str, int], length: int
) -> list[str]:
    """What is left out or cut of each split, in sentences."""
    counted = {
        f"have nothing to learn within max_length {length}": left_out,
        f"are longer than max_length {length}: their end is cut off": truncated,
    }
    return [
        f"{count} of {len(splits[name])} rows of {name} {what}"
        for what, counts in counted.items()
        for name, count in counts.items()
        if count
    ]


def reasoning_notes(task: TaskData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How many conversations of train have reasoning that the tokenizer's chat template leaves out, in a sentence."""
    if task.kind != "chat" or tokenizer.chat_template is None:
        return []
    count = 0
    for messages in map(conversation, task.train):
        if reasoning := [thought for message in messages if (thought := reasoning_of(message))]:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            count += any(thought not in text for thought in reasoning)
    what = "their reasoning is not learned with this chat template"
    return [f"{count} of {len(task.train)} rows of train: {what}"] if count else []


def pieces_of(
    rows: Sequence[Row], split: str, task: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Encoded]]:
    """What of each of these rows of a split of a chat or text task is learned, see `cut`: nothing where a prompt fills
    `max_length`.

    Raises:
        ValueError: naming the row, by its place in the split from 1 on, that `encode_chat` refuses.
    """
    encode = encode_chat if task.kind == "chat" else encode_text
    pieces = []
    for row in rows:
        try:
            encoded = encode(row, tokenizer)
        except ValueError as error:
            number = next(i for i, other in enumerate(getattr(task, split), start=1) if other is row)
            where = f"row {number} of {split}, {prompt_of(row)!r:.60}"
            raise ValueError(f"task {task.name}: {where}: {error}") from error
        pieces.append(cut(encoded, max_length, task.kind == "text"))
    return pieces


def count_left_out(pieces: Sequence[Sequence[Encoded]], task: TaskData, split: str, max_length: int) -> int:
    """How many of a split's rows, given as `pieces_of`, have nothing to learn. ValueError if it is all of them."""
    left_out = sum(not of_row for of_row in pieces)
    if pieces and left_out == len(pieces):
        problem = f"none of the {left_out} rows of {split} has anything to learn within max_length {max_length}"
        raise ValueError(f"task {task.name}: {problem}: prompts fill it")
    return left_out
