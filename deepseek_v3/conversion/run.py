"""The whole conversion: load, convert, measure, heal, save."""

import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..configuration.local_paths import public_name
from ..data import Corpus, batch_indices, load_corpus, pack_documents, sample_order, tokenize_documents
from ..durable import write_json
from ..tokenization import DeepseekV3Tokenizer, check_vocab
from .healing import HeldoutText, heal, heldout_bits_per_byte
from .llama import convert_llama
from .source import load_source

CALIBRATION_TOKENS = 6144
HELDOUT_TOKENS = 20480  # of each text
DOCUMENT_CHARACTERS = 100_000  # longer documents are cut, so that a few long ones do not crowd out the rest


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    n_experts: int = 8,
    top_k: int = 2,
    n_shared: int = 3,
    first_k_dense: int = 1,
    data: Sequence[str] = ("stdlib",),
    heldout: Sequence[str] | None = None,
    text_field: str = "text",
    heal_tokens: int = 0,
    sequence_length: int = 512,
    batch_size: int = 2,
    learning_rate: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Convert a Llama-type checkpoint to DeepSeek-V3, in bf16 on disk with tokenizer and `conversion.json`.

    The folder appears whole, after the healing; Ctrl-C ends the healing after the current step and keeps what it has
    reached.

    Args:
        source: see `load_source`.
        output: a folder that does not exist yet, or is empty.
        kv_lora_rank, qk_rope_head_dim, n_experts, top_k, n_shared, first_k_dense: see `convert_llama`.
        data: texts for calibration and healing, as `data.load_corpus` takes them.
        heldout: one held-out text for each of `data`; default: a part of each that is not trained on.
        heal_tokens: tokens of healing; 0 for none.
        sequence_length, batch_size: tokens per row, rows per step.
        learning_rate: peak of the healing; default: `healing.LEARNING_RATE`.
        seed: of the routers and the order of the rows.

    Returns:
        What `conversion.json` holds: `bits_per_byte` of the source, the converted and the healed model on each
        held-out text (the first 20,480 tokens, or all if it has fewer), all three in bf16, and the healing's record.
        Of local paths it holds the names.

    Raises:
        ValueError: see `load_source`, `convert_llama`, `load_corpus`; an output folder that is not empty, or two texts
            of one name.
    """
    folder = Path(output)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output: found {str(folder)!r}, allowed a folder that does not exist yet, or is empty")
    if heldout is not None and len(heldout) != len(data):
        raise ValueError(f"heldout: found {len(heldout)} texts, allowed one for each of the {len(data)} in data")
    names = _names("data", data)
    heldout_names = names if heldout is None else _names("heldout", heldout)
    corpora = [
        load_corpus(text, heldout=None if heldout is None else heldout[i], text_field=text_field)
        for i, text in enumerate(data)
    ]
    original, source_tokenizer = load_source(source)
    part = folder.with_name(f".{folder.name}.partial")  # renamed at the end: `output` appears whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    tokenizer = save_tokenizer(source_tokenizer, part)
    check_vocab(tokenizer, original.config.vocab_size)
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    train = pack_documents(_train_tokens(corpora, tokenizer), sequence_length, **ids)
    texts = {
        name: HeldoutText.of(corpus, tokenizer, HELDOUT_TOKENS, sequence_length)
        for name, corpus in zip(heldout_names, corpora, strict=True)
    }

    rows = batch_indices(len(train), 0, min(len(train), -(-CALIBRATION_TOKENS // sequence_length)), seed)
    converted = convert_llama(
        original, train.rows(rows)["input_ids"], kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim,
        n_experts=n_experts, top_k=top_k, n_shared=n_shared, first_k_dense=first_k_dense, seed=seed,
    )  # fmt: skip
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    converted.config.update(special)
    converted.generation_config = GenerationConfig(**special)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original, converted = original.to(device, torch.bfloat16), converted.to(device, torch.bfloat16)

    measured = {"source": original, "converted": converted}
    figures = {name: {k: heldout_bits_per_byte(m, text) for k, m in measured.items()} for name, text in texts.items()}
    report: dict[str, Any] = {
        "source": public_name(str(source)),
        "data": {name: corpus.sha256 for name, corpus in zip(names, corpora, strict=True)},
        "calibration_tokens": len(rows) * sequence_length,
        "heldout": {name: {"tokens": text.tokens, "bytes": text.n_bytes} for name, text in texts.items()},
        "bits_per_byte": figures,
    }
    if heal_tokens:
        report["healing"] = heal(
            converted, original, train, heal_tokens, batch_size=batch_size, learning_rate=learning_rate, seed=seed
        )
        for name, text in texts.items():
            figures[name]["healed"] = heldout_bits_per_byte(converted, text)
    converted.save_pretrained(part)
    write_json(part / "conversion.json", report)
    part.rename(folder)
    return report


def _names(field: str, texts: Sequence[str]) -> list[str]:
    """What the report calls the texts: without their paths, for it is published."""
    names = [public_name(str(text)) for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{field}: found a second text called {twice[0]!r}, allowed is one")
    return names


def save_tokenizer(tokenizer: Any, folder: Path) -> DeepseekV3Tokenizer:
    """Save in the form that programs without this package read, too, and load it back.

    A tokenizer that pads with its EOS gets its unknown token, which a byte-level vocabulary never uses, as padding:
    whoever masks padding in the loss would otherwise never teach the model to stop.

    Raises:
        ValueError: it has no BOS, no EOS, or nothing to pad with.
    """
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer: {name} is not set, allowed is a token: documents stand between the two")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
            raise ValueError(f"tokenizer: found EOS {tokenizer.eos_token!r} for padding and no other token for it")
        tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    ours = DeepseekV3Tokenizer.from_pretrained(folder)
    ours.save_pretrained(folder)
    return ours


def _train_tokens(corpora: Sequence[Corpus], tokenizer: DeepseekV3Tokenizer) -> list:
    """Token ids of the training documents, every corpus with the same number of tokens, that of the smallest."""
    tokens = []
    for corpus in corpora:
        pieces = (
            document.text[start : start + DOCUMENT_CHARACTERS]
            for document in corpus.train
            for start in range(0, len(document.text), DOCUMENT_CHARACTERS)
        )
        tokens.append(list(tokenize_documents(pieces, tokenizer)))
    smallest = min(sum(map(len, documents)) for documents in tokens)
    chosen = []
    for documents in tokens:
        total = 0
        for i in sample_order(len(documents), 0, 0):  # the files may be sorted, by date for instance
            if total >= smallest:
                break
            chosen.append(documents[i][: smallest - total])
            total += len(chosen[-1])
    return chosen

