"""From a corpus to packed tokens: the tokenizer (trained if there is none), training rows, held-out rows."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ..data import Corpus, PackedDataset, pack_documents, tokenize_documents
from ..process import say
from ..tokenization import DeepseekV3Tokenizer, train_tokenizer
from .recipe import Recipe


@dataclass(frozen=True)
class TextData:
    """A corpus, its tokenizer, and both packed."""

    corpus: Corpus
    tokenizer: DeepseekV3Tokenizer
    train: PackedDataset
    heldout: PackedDataset
    train_tokens: list
    heldout_tokens: list

    @property
    def bytes_per_token(self) -> float:
        return self.corpus.train_bytes / (len(self.train.stream) - len(self.train.document_starts))


def prepare_text(recipe: Recipe, output: Path, corpus: Corpus, accelerator: Accelerator) -> TextData:
    say(
        f"{corpus.name}: {len(corpus.train)} documents, {corpus.train_bytes / 1e6:.2f} MB to train on; "
        f"{len(corpus.heldout)} documents, {corpus.heldout_bytes / 1e6:.2f} MB held out"
    )
    folder = Path(recipe.tokenizer) if recipe.tokenizer else output / "tokenizer"
    if not recipe.tokenizer and accelerator.is_main_process:
        vocab_size = recipe.config().vocab_size
        origin = json.dumps({"corpus_sha256": corpus.sha256, "vocab_size": vocab_size})
        stamp = folder / "trained_on.json"
        if not stamp.exists() or stamp.read_text() != origin:
            say(f"training a byte-level BPE of {vocab_size} tokens")
            tokenizer = train_tokenizer((d.text for d in corpus.train), vocab_size)
            temporary = output / f".tokenizer.tmp-{os.getpid()}"
            tokenizer.save_pretrained(temporary)
            (temporary / stamp.name).write_text(origin)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    accelerator.wait_for_everyone()
    tokenizer = DeepseekV3Tokenizer.from_pretrained(folder)
    train_tokens = list(tokenize_documents((d.text for d in corpus.train), tokenizer))
    heldout_tokens = list(tokenize_documents((d.text for d in corpus.heldout), tokenizer))
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    train = pack_documents(train_tokens, recipe.sequence_length, **ids)
    context = recipe.sequence_length // 2
    heldout = pack_documents(heldout_tokens, recipe.sequence_length, **ids, evaluation=True, context=context)
    return TextData(corpus, tokenizer, train, heldout, train_tokens, heldout_tokens)
