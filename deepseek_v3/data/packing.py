"""Packing: documents become rows of one length, with their boundaries declared through position ids.

A document is ``BOS token … token EOS``, and documents follow each other without padding. Position ids restart at 0 at
each document start and at each row start: that is how a packed boundary is declared to the model, which keeps
attention inside a document if it is given them.

Labels equal the input ids (the model shifts them), with one exception: the first token of each document is -100.
Predicting "BOS" from the EOS before it is certain, teaches nothing and would flatter the loss.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
_ENCODE_CHUNK = 256  # documents per tokenizer call: the offsets and masks it builds are much larger than the ids


def tokenize_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Encode texts with a Hugging Face fast tokenizer, without special tokens, in batches.

    Yields:
        One int32 array ``[tokens]`` per text, in order.
    """
    texts = list(texts)
    for start in range(0, len(texts), _ENCODE_CHUNK):
        encoded = tokenizer(
            texts[start : start + _ENCODE_CHUNK],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # documents longer than model_max_length are meant: packing cuts them into rows
        )
        for ids in encoded["input_ids"]:
            yield np.asarray(ids, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """Rows of ``sequence_length`` tokens cut from one token stream. Map-style: works with any `DataLoader`.

    Attributes:
        stream: ``[tokens]`` uint16 (uint32 for ids above 65,535), all documents one after the other.
        document_starts: ``[documents]`` int64, sorted offsets of document starts in `stream`.
        sequence_length: tokens per row.
        stride: offset from one row's start to the next: `sequence_length`, or less for evaluation. What a row repeats
            of the one before is context: its labels are -100.
    """

    stream: np.ndarray
    document_starts: np.ndarray
    sequence_length: int
    stride: int

    def __len__(self) -> int:
        return 1 + (len(self.stream) - self.sequence_length) // self.stride

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """``input_ids``, ``position_ids`` and ``labels`` of one row: int64 tensors ``[sequence_length]``."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a packed dataset of {len(self)} rows")
        begin = row * self.stride
        end = begin + self.sequence_length
        first, last = np.searchsorted(self.document_starts, (begin, end))
        starts = self.document_starts[first:last] - begin

        input_ids = self.stream[begin:end].astype(np.int64)
        latest_start = np.zeros(self.sequence_length, dtype=np.int64)
        latest_start[starts] = starts
        position_ids = np.arange(self.sequence_length) - np.maximum.accumulate(latest_start)
        labels = input_ids.copy()
        labels[starts] = IGNORE_INDEX
        if row > 0:
            labels[: self.sequence_length - self.stride] = IGNORE_INDEX
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def rows(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """The same keys as ``self[i]``, stacked: int64 tensors ``[len(indices), sequence_length]``."""
        rows = [self[int(i)] for i in indices]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def pack_documents(
    token_docs: Iterable[Sequence[int] | np.ndarray],
    sequence_length: int,
    *,
    bos_id: int,
    eos_id: int,
    evaluation: bool = False,
    context: int = 1,
) -> PackedDataset:
    """Pack tokenized documents (without special tokens) into rows.

    Args:
        token_docs: token ids per document. BOS and EOS are added here: the DeepSeek tokenizer adds neither.
        sequence_length: tokens per row, at least 2.
        evaluation: False (training) drops the last, partial row: less than one row is lost, and every batch is full.
            True makes rows overlap and fills the last row with one-token documents of EOS (label -100), so that every
            token but BOS is predicted exactly once. Summed losses then cover the text, and `metrics.bits_per_byte`
            holds.
        context: for evaluation, how many tokens rows overlap by, that is how many at least precede a predicted token
            (but in the first row): 1 to `sequence_length` - 1. Evaluation takes longer by
            `sequence_length / (sequence_length - context)`.

    Raises:
        ValueError: `sequence_length` below 2, `context` out of its range, no document,
            too little text for one training row, or an id that is negative or above 32 bits.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, found {sequence_length}")
    if not 1 <= context < sequence_length:
        raise ValueError(f"context must lie in [1, sequence_length - 1 = {sequence_length - 1}], found {context}")
    pieces = []  # compact at once: a whole corpus in int64 takes four times the memory of its stream
    for number, doc in enumerate(token_docs):
        ids = np.concatenate(([bos_id], np.asarray(doc, dtype=np.int64), [eos_id]))
        low, high = ids.min(), ids.max()
        if low < 0 or high >= 2**32:
            raise ValueError(
                f"pack_documents: document {number}: token ids must lie in [0, 2**32), found {low} to {high}"
            )
        pieces.append(ids.astype(np.uint16 if high < 2**16 else np.uint32))
    if not pieces:
        raise ValueError("pack_documents: no documents")
    lengths = np.array([len(piece) for piece in pieces])
    starts = np.cumsum(lengths) - lengths
    stream = np.concatenate(pieces)  # in the widest type of its documents

    stride = sequence_length - context if evaluation else sequence_length
    if evaluation:
        missing = sequence_length - len(stream)
        filler = missing if missing > 0 else missing % stride
        starts = np.concatenate([starts, len(stream) + np.arange(filler)])
        stream = np.concatenate([stream, np.full(filler, eos_id, dtype=stream.dtype)])
    elif len(stream) < sequence_length:
        raise ValueError(f"pack_documents: {len(stream)} tokens fill no row of sequence_length {sequence_length}")
    return PackedDataset(stream, starts, sequence_length, stride)
