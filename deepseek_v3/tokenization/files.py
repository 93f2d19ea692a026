"""Checks on tokenizer files that come from elsewhere, each failing with the file's name."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .vocabulary import SPLIT_PATTERNS

# Eight times V3's vocabulary. An id far above is damage or an attack: the embedding table would have to be that long.
MAX_TOKEN_ID = 2**20 - 1

# The `tokenizers` library runs these by backtracking; a pattern such as (a+)+$ stalls it and then panics with a
# BaseException while a text is encoded. So only patterns that many models use are let through: DeepSeek's own and the
# cl100k one of GPT-4, Llama 3 (digits in threes) and Qwen (single digits), which V3-shaped models of others use.
_CL100K = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
KNOWN_PATTERNS = frozenset((*SPLIT_PATTERNS, _CL100K % "{1,3}", _CL100K % ""))


def read_json(file: str | PathLike) -> dict[str, Any]:
    """The JSON object in `file`; `ValueError` naming the file for anything else."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, a JSON object is expected")
    return content


def check_tokenizer_file(file: str | PathLike) -> None:
    """Refuse a `tokenizer.json` that is not a byte-level BPE with sane ids and known split patterns.

    Raises:
        ValueError: names `file`, the field, what was found and what is allowed.
    """
    content = read_json(file)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        found = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise ValueError(f"{file}: model is {found!r}, only 'BPE' is allowed")
    vocab, added = model.get("vocab"), content.get("added_tokens", [])
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{file}: model.vocab must be a non-empty object of token -> id")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{file}: added_tokens must be a list of objects")
    for token, token_id in (*vocab.items(), *((token.get("content"), token.get("id")) for token in added)):
        # bool is an int to Python, hence the exact type
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ValueError(f"{file}: token {token!r} has id {token_id!r}, allowed are 0 to {MAX_TOKEN_ID}")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for pattern in _patterns(content.get(part)):
            if pattern not in KNOWN_PATTERNS:
                raise ValueError(
                    f"{file}: {part} has the unknown pattern {pattern!r}; allowed are DeepSeek's and the cl100k ones. "
                    "If you trust it, load the folder with transformers.PreTrainedTokenizerFast"
                )


def _patterns(node: Any) -> list[str]:
    """Every {"Regex": ...} at any depth."""
    if isinstance(node, list):
        return [pattern for child in node for pattern in _patterns(child)]
    if not isinstance(node, dict):
        return []
    own = [node["Regex"]] if isinstance(node.get("Regex"), str) else []
    return own + [pattern for child in node.values() for pattern in _patterns(child)]


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that a model has no embedding for (they would be an index error in the first step).

    Args:
        tokenizer: any transformers tokenizer.
        vocab_size: `config.vocab_size`; larger than needed is fine (official V3: 129280 for ids up to 128814).

    Raises:
        ValueError: names the token and both numbers.
    """
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id >= vocab_size:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"tokenizer {name!r}: token {token!r} has id {token_id}, but "
            f"config.vocab_size is {vocab_size}; it must be at least {token_id + 1}"
        )
