"""Moonlight's and Kimi's tokenizer as a `tokenizer.json`: byte pairs in tiktoken's format, the rest in remote code."""

import base64
import binascii
from os import PathLike
from pathlib import Path

from tokenizers import AddedToken
from transformers.convert_slow_tokenizer import TikTokenConverter

from .files import MAX_FILE_BYTES, MAX_TOKEN_ID, MOONSHOT_PATTERN, check_tokenizer_config
from .tokenizer import DeepseekV3Tokenizer

RANKS, CONFIG, FILE = "tiktoken.model", "tokenizer_config.json", "tokenizer.json"
RESERVED = 256  # ids of special tokens after the byte pairs, with or without a name
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def convert_tiktoken(folder: str | PathLike[str]) -> DeepseekV3Tokenizer:
    """Write `tokenizer.json` beside the `tiktoken.model` of a Moonlight or Kimi checkpoint, and return the tokenizer.

    Their repositories hold byte pairs and names of special tokens, and keep the split pattern in code of their own
    (`tokenization_moonshot.py`, `tokenization_kimi.py`, `TikTokenTokenizer`), which is written here once more. The ids
    are tiktoken's. `tokenizer_config.json` is rewritten without the reference to that code; the one that was there
    stays as `tokenizer_config.original.json`.

    Raises:
        ValueError: a file is missing, cannot be read, or there is a `tokenizer.json` already; names it.
    """
    folder = Path(folder)
    for name in (RANKS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not found; allowed are folders of Moonlight and Kimi checkpoints")
    original = folder / "tokenizer_config.original.json"
    for path in (folder / FILE, original):
        if path.exists():
            raise ValueError(f"{path}: is there already; delete it to convert anew")
    config = check_tokenizer_config(folder / CONFIG)
    ranks = _read_ranks(folder / RANKS)
    names = {str(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}

    backend = _ByteLevelBPE(ranks, pattern=MOONSHOT_PATTERN).converted()
    backend.add_tokens(
        [
            AddedToken(str(token.get("content")), special=bool(token.get("special", True)), normalized=False)
            for number in range(len(ranks), len(ranks) + RESERVED)
            for token in [names.get(str(number), {"content": f"<|reserved_token_{number}|>"})]
        ]
    )
    special = {name: _text(config.get(name)) for name in NAMED if config.get(name)}
    if unknown := [token for token in special.values() if backend.token_to_id(token) is None]:
        raise ValueError(f"{folder / CONFIG}: found no id for {unknown[0]!r:.100} in added_tokens_decoder")
    tokenizer = DeepseekV3Tokenizer(
        tokenizer_object=backend,
        add_bos_token=False,
        add_eos_token=False,
        chat_template=config.get("chat_template"),
        model_max_length=config.get("model_max_length"),
        **special,
    )
    (folder / CONFIG).rename(original)
    tokenizer.save_pretrained(folder)
    return tokenizer


class _ByteLevelBPE(TikTokenConverter):
    """transformers' conversion, of ranks that are read and checked here."""

    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        super().__init__(pattern=pattern)
        self.ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: str | None) -> dict[bytes, int]:
        return self.ranks


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, from lines ``BASE64 RANK``."""
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: found {size} bytes, allowed {MAX_FILE_BYTES}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}:{number}: found {line!r:.60}, allowed is a token in base64, its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not 256 <= len(ranks) <= MAX_TOKEN_ID - RESERVED:
        raise ValueError(f"{path}: found {len(ranks)} tokens whose ranks are not 0, 1, 2 and so on")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: found no token for the byte {missing[0]}, which is needed to write any text")
    return ranks


def _text(token: object) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)
