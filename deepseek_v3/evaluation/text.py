"""Text as rows of tokens, and what a causal language model needs to write it down."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..configuration.local_paths import public_name
from ..data import (
    IGNORE_INDEX,
    Document,
    PackedDataset,
    gzip_bits_per_byte,
    load_corpus,
    ngram_bits_per_byte,
    pack_documents,
    tokenize_documents,
)
from ..data.sources import DATASETS_PREFIX, read_datasets, read_files
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..modeling_deepseek_v3.losses import linear_cross_entropy
from .estimates import ratio_of_sums

HELDOUT_PREFIX = "heldout:"
LENGTH = 256  # tokens per row
BATCH_TOKENS = 2048
PROMPTS, PROMPT_TOKENS = 16, 64


@dataclass(frozen=True)
class Text:
    """Documents to score.

    Attributes:
        name: of the source, without a local path: records are published.
        training: what a baseline may learn from: the other split of the same corpus, or nothing.
        sha256: over names and texts of `documents`: equal hashes mean equal text.
    """

    name: str
    documents: Sequence[Document]
    training: Sequence[Document]
    licence: str | None
    sha256: str

    @property
    def n_bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self.documents)


def read_text(source: str) -> Text:
    """A text, a ``.jsonl`` file, a folder, a glob or ``datasets:NAME[:CONFIG[:SPLIT]]``: all of it.

    ``stdlib`` and ``heldout:SOURCE`` are the held-out split that pretraining makes of such a source.

    Raises:
        ValueError: naming the file that cannot be read, or a source without text.
    """
    training: Sequence[Document] = ()
    licence = None
    if source == "stdlib" or source.startswith(HELDOUT_PREFIX):
        corpus = load_corpus(source.removeprefix(HELDOUT_PREFIX))
        name, documents, training, licence = corpus.name, corpus.heldout, corpus.train, corpus.licence
        name = f"{public_name(name)}, held-out split"
    elif source.startswith(DATASETS_PREFIX):
        (documents, licence), name = read_datasets(source, "text"), public_name(source)
    else:
        documents, name = read_files(source, "text"), public_name(source)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"text {source!r}: no document holds any text")
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            digest.update(hashlib.sha256(part.encode()).digest())
    return Text(name, documents, training, licence, digest.hexdigest())


def check_count(name: str, count: int | None) -> None:
    """ValueError unless `count` is a whole number from 1, or None for all."""
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{name}: found {count}, allowed are whole numbers from 1")


@dataclass(frozen=True)
class TextRows:
    """Rows drawn from a text, in the tokens of one tokenizer.

    Attributes:
        dataset: overlapping rows of the whole text: each token is predicted once, after at least half a row.
        chosen: the row numbers, ascending.
        bytes_per_token: UTF-8 bytes of the whole text per predicted token.
    """

    text: Text
    dataset: PackedDataset
    chosen: np.ndarray
    bytes_per_token: float

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """`input_ids` and `labels` (-100 where nothing is predicted), int64 `[B, S]`."""
        size = max(1, BATCH_TOKENS // self.dataset.sequence_length)
        for start in range(0, len(self.chosen), size):
            batch = self.dataset.rows(self.chosen[start : start + size])
            yield {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    def prompts(self, count: int = PROMPTS) -> list[torch.Tensor]:
        """The beginnings of the first `count` chosen rows, int64 `[PROMPT_TOKENS]` or a shorter row's half."""
        tokens = min(PROMPT_TOKENS, self.dataset.sequence_length // 2)
        return [self.dataset[int(row)]["input_ids"][:tokens] for row in self.chosen[:count]]

    def describe(self) -> dict[str, Any]:
        """What was scored, JSON-ready."""
        labels = np.concatenate([batch["labels"][:, 1:].flatten().numpy() for batch in self.batches()])
        return {
            "name": self.text.name,
            "sha256": self.text.sha256,
            "licence": self.text.licence,
            "rows": len(self.chosen),
            "rows_of": len(self.dataset),
            "length": self.dataset.sequence_length,
            "tokens": int((labels != IGNORE_INDEX).sum()),
        }


def text_rows(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int = LENGTH, rows: int | None = None, seed: int = 0
) -> TextRows:
    """Cut a text into rows of `length` tokens and draw `rows` of them by `seed` (None: all).

    Raises:
        ValueError: `rows` below 1.
    """
    check_count("rows", rows)
    tokens = list(tokenize_documents((document.text for document in text.documents), tokenizer))
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    dataset = pack_documents(
        tokens, length, bos_id=bos, eos_id=tokenizer.eos_token_id, evaluation=True, context=length // 2
    )
    order = np.random.default_rng(seed).permutation(len(dataset))[:rows]
    predicted = len(dataset.stream) - len(dataset.document_starts)
    return TextRows(text, dataset, np.sort(order), text.n_bytes / predicted)


@torch.no_grad()
def row_nats(model: DeepseekV3ForCausalLM, rows: TextRows) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood (nats) and number of predicted tokens of each row, float64 `[N]` both.

    Packed documents see each other, as in pretraining.
    """
    model.eval()
    nats, tokens = [], []
    for batch in rows.batches():
        targets = batch["labels"][:, 1:].to(model.device)
        states = model.model(batch["input_ids"].to(model.device), use_cache=False).last_hidden_state[:, :-1]
        predicted = targets != IGNORE_INDEX
        ones = torch.ones(int(predicted.sum()), device=model.device)
        _, each = linear_cross_entropy(states[predicted], model.lm_head, targets[predicted], ones)
        sums = torch.zeros(targets.shape, dtype=torch.float64, device=model.device)
        sums[predicted] = each.double()
        nats.append(sums.sum(-1).cpu().numpy())
        tokens.append(predicted.sum(-1).double().cpu().numpy())
    return np.concatenate(nats), np.concatenate(tokens)


def text_results(model: DeepseekV3ForCausalLM, rows: TextRows) -> dict[str, Any]:
    """Bits per byte and per token of the rows, with intervals over the rows."""
    nats, tokens = row_nats(model, rows)
    bits = nats / math.log(2)
    return {
        **rows.describe(),
        "bits_per_byte": ratio_of_sums(bits, tokens * rows.bytes_per_token),
        "bits_per_token": ratio_of_sums(bits, tokens),
    }


def text_anchors(rows: TextRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Bits per byte of what a model has to beat, on the whole text: gzip -9, and a 5-gram model of the same tokens
    where the text has a training split."""
    text = rows.text
    anchors = {"gzip": gzip_bits_per_byte(text.documents)}
    if text.training:
        known, scored = (
            list(tokenize_documents((document.text for document in documents), tokenizer))
            for documents in (text.training, text.documents)
        )
        anchors["5-gram"] = ngram_bits_per_byte(
            known, scored, vocab_size=len(tokenizer), heldout_bytes=text.n_bytes
        )
    return anchors
