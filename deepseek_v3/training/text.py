"""From a corpus to packed tokens: the tokenizer (trained if there is none), training rows, held-out rows."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers.utils import cached_file

from ..data import Corpus, Document, PackedDataset, pack_documents, tokenize_documents
from ..durable import file_sha256, write_text
from ..process import say
from ..tokenization import DeepseekV3Tokenizer, check_vocab, train_tokenizer
from .recipe import Recipe


@dataclass(frozen=True)
class TextData:
    """A corpus, its tokenizer, and both packed."""

    corpus: Corpus
    tokenizer: DeepseekV3Tokenizer
    train: PackedDataset
    heldout: PackedDataset

    @property
    def bytes_per_token(self) -> float:
        return self.corpus.train_bytes / (len(self.train.stream) - len(self.train.document_starts))


def load_tokenizer(
    recipe: Recipe, output: Path, corpus: Corpus, accelerator: Accelerator
) -> tuple[DeepseekV3Tokenizer, dict[str, Any]]:
    """The recipe's tokenizer, or one that the main process trains on `corpus`; and what tells it from another.

    Raises:
        ValueError: it has no BOS or no EOS, others than the recipe's `model`, or ids beyond the model's vocabulary.
    """
    say(
        f"{corpus.name}: {len(corpus.train)} documents, {corpus.train_bytes / 1e6:.2f} MB to train on; "
        f"{len(corpus.heldout)} documents, {corpus.heldout_bytes / 1e6:.2f} MB held out"
    )
    vocab_size = recipe.config().vocab_size
    folder = Path(recipe.tokenizer) if recipe.tokenizer else output / "tokenizer"
    if not recipe.tokenizer and accelerator.is_main_process:
        origin = json.dumps({"corpus_sha256": corpus.sha256, "vocab_size": vocab_size})
        stamp = folder / "trained_on.json"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != origin:
            say(f"training a byte-level BPE of {vocab_size} tokens")
            tokenizer = train_tokenizer((d.text for d in corpus.train), vocab_size)
            temporary = output / f".tokenizer.tmp-{os.getpid()}"
            tokenizer.save_pretrained(temporary)
            write_text(temporary / stamp.name, origin)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    accelerator.wait_for_everyone()
    tokenizer = DeepseekV3Tokenizer.from_pretrained(folder)
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"{folder}: {name} is not set, allowed is a token: every document stands between the two")
        known = getattr(tokenizer, f"{name}_id")
        if (found := recipe.model.get(f"{name}_id", known)) != known:
            raise ValueError(f"{folder}: {name}_id is {known}, but the recipe's model has {found}; leave it out there")
    check_vocab(tokenizer, vocab_size)
    identity = {"sha256": file_sha256(Path(cached_file(str(folder), "tokenizer.json")))}
    identity |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, identity


def prepare_text(recipe: Recipe, corpus: Corpus, tokenizer: DeepseekV3Tokenizer) -> TextData:
    """Tokenize and pack both splits."""

    def pack(split: Sequence[Document], **options: Any) -> PackedDataset:
        tokens = tokenize_documents((document.text for document in split), tokenizer)
        ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
        return pack_documents(tokens, recipe.sequence_length, **ids, **options)

    heldout = pack(corpus.heldout, evaluation=True, context=recipe.sequence_length // 2)
    return TextData(corpus, tokenizer, pack(corpus.train), heldout)


def documents(packed: PackedDataset) -> list[np.ndarray]:
    """The token ids of each document without BOS and EOS: views of the stream, `[tokens]` each."""
    pieces = np.split(packed.stream, packed.document_starts[1:])
    return [piece[1:-1] for piece in pieces if len(piece) > 1]  # an EOS alone fills up the last held-out row
