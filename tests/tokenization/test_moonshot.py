"""Moonlight's tokenizer as a tokenizer.json: tiktoken's ids for the same byte pairs, pattern and special tokens."""

import base64
import random
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from deepseek_v3.tokenization import DeepseekV3Tokenizer, convert_tiktoken, load_tokenizer
from deepseek_v3.tokenization.moonshot import RESERVED
from tests.tokenization.moonshot_files import NAMES, PATTERN, train_ranks, write_files

TEXT = (
    "It's 中文English混合 they'LL don't 1234567 Straße ÉCOLE Àé مرحبا बहुत ไทย 日本語テキスト\n\n"
    "  def f(x):\r\n\treturn x!=2 "
)
AWKWARD = (
    "aAzZſéÉ中〇々ー日にアไтТЯ١४Ⅷ²½'’sStTlLreVE \t\n\r\u0085\u200b\u00a0\u3000\u2028\u0301!?.,-_/|@09😀🇩ǅǈʰẞß"
    "\0\x1c\ufeff"
)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train_ranks([TEXT, TEXT.lower(), str(__doc__), *(TEXT[i:] for i in range(0, 80, 7))], 500)


@pytest.fixture
def folder(ranks: dict[bytes, int], tmp_path: Path) -> Path:
    write_files(tmp_path, ranks)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    return tmp_path


def test_the_ids_are_tiktoken_s(folder: Path, ranks: dict[bytes, int]) -> None:
    convert_tiktoken(folder)
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer) is DeepseekV3Tokenizer and len(tokenizer) == len(ranks) + RESERVED
    special = {f"<|reserved_token_{len(ranks) + i}|>": len(ranks) + i for i in (3, 9)}
    special |= {token: len(ranks) + i for i, token in NAMES.items()}
    expected = tiktoken.Encoding("m", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    numbers = random.Random(0)
    cases = ["".join(numbers.choices(AWKWARD, k=numbers.randint(1, 40))) for _ in range(4000)]
    cases += [f"a{chr(code)}B" for code in range(0, 0x30000, 23) if not 0xD800 <= code < 0xE000]
    cases += [TEXT * 3, f"[BOS]hi<|im_end|>[EOS]<|reserved_token_{len(ranks) + 9}|>"]
    for case in cases:
        assert tokenizer(case).input_ids == expected.encode(case, allowed_special="all"), ascii(case)
    assert tokenizer.decode(tokenizer("It's 中文[EOS]").input_ids, skip_special_tokens=True) == "It's 中文"


def test_what_else_the_folder_says_is_kept(folder: Path) -> None:
    before = (folder / "tokenizer_config.json").read_text()
    convert_tiktoken(folder)
    assert (folder / "tokenizer_config.original.json").read_text() == before
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert tokenizer.model_max_length == 8192
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    with pytest.raises(ValueError, match="tokenizer.json: is there already"):
        convert_tiktoken(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tiktoken.model", None, "tiktoken.model: not found; allowed are folders of Moonlight and Kimi"),
        ("tokenizer_config.json", None, "tokenizer_config.json: not found"),
        ("tiktoken.model", b"YQ== 0\nYg==\n", r"tiktoken.model:2: found b'Yg=='"),
        ("tiktoken.model", b"YQ== 0\n!! 1\n", r"tiktoken.model:2: found b'!! 1'"),
        ("tiktoken.model", b"YQ== 0\nYg== 2\n", "found 2 tokens whose ranks are not 0, 1, 2"),
        ("tiktoken.model", b"".join(b"%s %d\n" % (base64.b64encode(b"%d!" % i), i) for i in range(300)), "the byte 0"),
        ("tokenizer_config.json", b'{"bos_token": "[X]"}', r"found no id for '\[X\]' in added_tokens_decoder"),
    ],
)
def test_what_cannot_be_converted_stays_as_it_is(folder: Path, name: str, content: bytes | None, message: str) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        convert_tiktoken(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_split_pattern_stays_fast_on_awkward_text(folder: Path) -> None:
    """Two classes that overlap, one after the other: a run of what only the first takes is tried at every length."""
    tokenizer = convert_tiktoken(folder)
    for run in ("a", "A", "ไ", "aA", "ǅ", "\u0301", " ", "\n", "1", "中", "'"):
        assert tokenizer(run * 20_000 + "\0").input_ids
