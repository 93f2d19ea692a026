"""From rows to tensors: classification, conversations with the loss on what the assistant says, packed rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..data import IGNORE_INDEX

Row = Mapping[str, Any]
# Lengths are rounded up to this: on a CPU every new shape costs the compilation of a matrix product.
PAD_MULTIPLE = 8
BATCH = 16  # rows of a forward pass that nothing is learned from


@dataclass(frozen=True)
class Encoded:
    """One example: token ids and, of the same length, labels (-100 where nothing is to be learned); and whether its
    end was cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False


def encode_classification(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], max_length: int
) -> list[dict[str, Any]]:
    """`text`, `label` -> `input_ids` (cut at the end to `max_length`), `labels`, the class's number, and `truncated`,
    whether anything was cut."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length).encodings
    assert found is not None  # of a tokenizer that was read from tokenizer.json
    return [
        {"input_ids": one.ids, "labels": numbers[row["label"]], "truncated": bool(one.overflowing)}
        for one, row in zip(found, rows, strict=True)
    ]


def pad_classification(batch: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Collator: `input_ids`, `attention_mask` `[B, S]` padded on the right, `labels [B]`; int64."""
    length = max(len(example["input_ids"]) for example in batch)
    length = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(batch), length), pad_id)
    mask = torch.zeros(len(batch), length, dtype=torch.int64)
    for i, example in enumerate(batch):
        input_ids[i, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        mask[i, : len(example["input_ids"])] = 1
    labels = torch.tensor([example["labels"] for example in batch])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of rows in batches of `BATCH`, short ones first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def unlabelled_batches(
    examples: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Rows of `encode_classification` by length: their positions, and `input_ids`, `attention_mask` on `device`."""
    for chosen in by_length([len(example["input_ids"]) for example in examples]):
        batch = pad_classification([examples[i] for i in chosen], pad_id)
        yield chosen, {name: value.to(device) for name, value in batch.items() if name != "labels"}


def conversation(row: Row) -> list[dict[str, str]]:
    """The messages of a row with `messages`, or with a `prompt` and a `completion` (texts or lists of messages)."""
    if "messages" in row:
        return list(row["messages"])
    prompt, completion = row["prompt"], row["completion"]
    return _turns("user", prompt) + _turns("assistant", completion)


def _turns(role: str, content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def encode_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A conversation in the tokenizer's chat template; only what the assistant writes, its end of turn included, has
    labels, and not where it speaks first: nothing asked for that. A prompt and completion of plain text stand one
    after the other if the tokenizer has no template.

    The assistant's part is what the template marks as generation, or else what each turn adds to the prompt before it.

    Raises:
        ValueError: no assistant turn after the first message; a template that fails; or one that rewrites earlier
            turns, so that no part of the text is certainly the assistant's.
    """
    if tokenizer.chat_template is None:
        if "messages" in row or not isinstance(row["prompt"], str):
            raise ValueError("the tokenizer has no chat template: rows of messages need one")
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return Encoded(prompt + completion, [IGNORE_INDEX] * len(prompt) + completion)
    messages = conversation(row)
    if all(message["role"] != "assistant" for message in messages[1:]):
        roles = [message["role"] for message in messages]
        raise ValueError(f"a conversation without an assistant's turn after the first: roles {roles}")
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            ids, mask = _marked(messages, tokenizer)
        else:
            ids, mask = _by_turns(messages, tokenizer)
    except (TemplateError, TypeError) as error:  # what a template raises, of its own accord or on missing content
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error
    return Encoded(ids, [token if marked else IGNORE_INDEX for token, marked in zip(ids, mask, strict=True)])


def _marked(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for what the template marks as generation."""
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    if messages[0]["role"] == "assistant":
        greeting = len(tokenizer.apply_chat_template(messages[:1], return_dict=True)["input_ids"])
        mask = [0] * greeting + mask[greeting:]
    return ids, mask


def _by_turns(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for what each turn of the assistant adds to the prompt before it.

    The ids are those of the whole text, unless tokens would merge across the border of prompt and answer: from there
    on, parts are tokenized each alone, as they are when the model answers.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ends = []  # of prompts and answers in turn
    for turn, message in enumerate(messages):
        if turn and message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
            after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
            if not text.startswith(after):
                problem = f"the chat template changes turns once others follow (here up to turn {turn})"
                raise ValueError(f"{problem}: give each row one answer")
            if not after.startswith(before):
                problem = "the chat template's prompt for an answer is not how it writes an answered turn"
                raise ValueError(f"{problem} (here turn {turn}): mark the answer by generation blocks")
            ends += [len(before), len(after)]
    ids: list[int] = []
    mask: list[int] = []
    for part, (start, end) in enumerate(pairwise([0, *ends, len(text)])):
        found = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        merged = found[: len(ids)] != ids
        ids += tokenizer(text[start:end], add_special_tokens=False)["input_ids"] if merged else found[len(ids) :]
        mask += [part % 2] * (len(ids) - len(mask))
    return ids, mask


def reasoning_of(message: Mapping[str, Any]) -> str:
    """What a message thinks before it answers: `reasoning_content`, or the content up to ``</think>``."""
    thought = (message.get("content") or "").rpartition("</think>")[0].split("<think>")[-1]
    return str(message.get("reasoning_content") or thought).strip()


def without_reasoning(answer: str) -> str:
    """An answer's text after ``</think>``, or all of it."""
    return answer.rpartition("</think>")[2]


def encode_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A document for continued pretraining: BOS (EOS if the tokenizer has none), `text`, EOS; all but the first is
    learned."""
    ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Encoded([start, *ids, tokenizer.eos_token_id], [IGNORE_INDEX, *ids, tokenizer.eos_token_id])


def cut(example: Encoded, length: int, split: bool) -> list[Encoded]:
    """The pieces of at most `length` tokens that have something to learn; the first label of each is -100.

    `split` takes all of a document: a piece begins with the last token of the one before it, so that every token is
    predicted once. Otherwise the end is cut off (conversations).
    """
    truncated = not split and len(example.input_ids) > length
    starts = range(0, max(1, len(example.input_ids) - 1), length - 1) if split else (0,)
    pieces = []
    for start in starts:
        labels = [IGNORE_INDEX, *example.labels[start + 1 : start + length]]
        if any(label != IGNORE_INDEX for label in labels):
            pieces.append(Encoded(example.input_ids[start : start + length], labels, truncated))
    return pieces


def pack(pieces: Sequence[Encoded], length: int, pad_id: int) -> list[dict[str, torch.Tensor]]:
    """Rows of `length` tokens, each of the `pieces` with position ids from 0, so that none attends to another.

    Pieces are `cut` to at most `length`. Longest first, each into the fullest row that has room for it. The rest of a
    row is padding, which attends to itself only and has no labels. `input_ids`, `labels`, `position_ids` `[length]`
    int64.
    """
    rows: list[list[Encoded]] = []
    free: list[int] = []
    by_space: dict[int, list[int]] = {}
    for piece in sorted(pieces, key=lambda p: len(p.input_ids), reverse=True):
        size = len(piece.input_ids)
        fitting = next((space for space in range(size, length) if by_space.get(space)), None)
        if fitting is None:
            rows.append([])
            free.append(length)
            index = len(rows) - 1
        else:
            index = by_space[fitting].pop()
        rows[index].append(piece)
        free[index] -= size
        by_space.setdefault(free[index], []).append(index)
    return [_row(row, length, pad_id) for row in rows]


def _row(pieces: Sequence[Encoded], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    input_ids = torch.full((length,), pad_id)
    labels = torch.full((length,), IGNORE_INDEX)
    position_ids = torch.zeros(length, dtype=torch.int64)
    start = 0
    for piece in pieces:
        end = start + len(piece.input_ids)
        input_ids[start:end] = torch.tensor(piece.input_ids)
        labels[start:end] = torch.tensor(piece.labels)
        position_ids[start:end] = torch.arange(end - start)
        start = end
    position_ids[start:] = torch.arange(length - start)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def stack(batch: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collator of packed rows: `[B, length]`."""
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
