"""A new vocabulary: layout, determinism, nothing lost, errors."""

import json
from pathlib import Path

import pytest

from deepseek_v3.tokenization import train_tokenizer
from deepseek_v3.tokenization.vocabulary import LEADING, TRAILING


def test_layout(trained):
    vocab = trained.get_vocab()
    assert sorted(vocab.values()) == list(range(600)) and len(trained) == 600
    assert [vocab[token] for token in LEADING] == [0, 1, 2]
    assert [vocab[token] for token in TRAILING] == list(range(583, 600))
    assert trained.encode("the dog", add_special_tokens=False) == [vocab["the"], vocab["Ġdog"]]
    assert trained.convert_tokens_to_ids("Ġdog") == vocab["Ġdog"]


def test_pre_tokenizer_and_flags_are_deepseeks(trained, official_folder):
    ours = json.loads(trained.backend_tokenizer.to_str())
    theirs = json.loads((official_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"] and ours["normalizer"] == theirs["normalizer"]
    ours, theirs = (
        {token.pop("content"): token for token in file["added_tokens"] if token.pop("id") is not None}
        for file in (ours, theirs)
    )
    for name in (*LEADING, *TRAILING, "<｜place▁holder▁no▁0｜>"):
        assert name not in ours or ours[name] == theirs[name], name


def test_same_text_gives_the_same_file(run_python):
    """Also in another process and with another number of threads: hash seeds and scheduling differ."""
    program = (
        f"import sys, hashlib; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from deepseek_v3.tokenization import train_tokenizer\n"
        "texts = [f'{word}{number} {word[::-1]} 数{number}' for number in range(300) for word in ('alpha', 'beta')]\n"
        "tokenizer = train_tokenizer((text for text in texts), 800)\n"
        "print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    assert run_python(program, RAYON_NUM_THREADS="1") == run_python(program, RAYON_NUM_THREADS="4")


def test_little_text_is_filled_with_placeholders(caplog):
    tokenizer = train_tokenizer(["ab ab"], 300)
    assert len(tokenizer) == 300 and sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert "placeholders" in caplog.text
    assert "<｜place▁holder▁no▁0｜>" in tokenizer.get_vocab()


def test_smallest_vocabulary_still_writes_everything():
    tokenizer = train_tokenizer(["ab"], 276)
    text = "any text: 任意 \x00 👩‍👧"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("vocab_size", [0, 275, 2**20 + 1])
def test_vocab_size_out_of_range(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}; allowed are 276 to 1048576"):
        train_tokenizer(["text"], vocab_size)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one string", "one string"),
        ([], "no character"),
        (["", ""], "no character"),
        (["good", None], r"texts\[1\] is a NoneType"),
        (["good", b"bytes"], r"texts\[1\] is a bytes"),
        (["good", "bad\ud800"], r"texts\[1\] is not Unicode text"),
    ],
)
def test_bad_texts(texts, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, 300)
