"""Small files like those of Moonlight: byte pairs in tiktoken's format, names of special tokens, no code."""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
# as in tokenization_moonshot.py
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 254: "[UNK]", 255: "[PAD]"}  # after the byte pairs


def train_ranks(texts: Iterable[str], size: int) -> dict[bytes, int]:
    trained = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return {bytes(byte_of[letter] for letter in token): rank for token, rank in trained.get_vocab().items()}


def write_files(folder: Path, ranks: dict[bytes, int]) -> None:
    lines = sorted((rank, base64.b64encode(token).decode()) for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("".join(f"{token} {rank}\n" for rank, token in lines))
    config = {
        "added_tokens_decoder": {str(len(ranks) + i): {"content": t, "special": True} for i, t in NAMES.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
        **{"bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}, "pad_token": "[PAD]", "unk_token": "[UNK]"},
        "chat_template": "{{ messages[0].content }}",
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
