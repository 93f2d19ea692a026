"""Damaged and hostile tokenizer files: always a ValueError that names the file."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from deepseek_v3.tokenization import DeepseekV3Tokenizer, load_tokenizer


@pytest.fixture()
def folder(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    return tmp_path


def _edit(folder, change):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def _set_vocab_id(token_id):
    return lambda content: content["model"]["vocab"].update({"Ġdog": token_id})


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
EDITS = {
    "vocab id 2**40": (_set_vocab_id(2**40), "has id 1099511627776, allowed are 0 to 1048575"),
    "vocab id 2**20": (_set_vocab_id(2**20), "has id 1048576"),
    "negative id": (_set_vocab_id(-1), "has id -1"),
    "id is text": (_set_vocab_id("7"), "has id '7'"),
    "id is true": (_set_vocab_id(True), "has id True"),
    "added id 2**31": (lambda content: content["added_tokens"][0].update(id=2**31), "has id 2147483648"),
    "added token is text": (lambda content: content.update(added_tokens=["<x>"]), "added_tokens must be"),
    "vocab is a list": (lambda content: content["model"].update(vocab=["a"]), "model.vocab must be"),
    "other model": (lambda content: content["model"].update(type="Unigram"), "model is 'Unigram'"),
    "model is null": (lambda content: content.update(model=None), "model is 'NoneType'"),
    "merge of unknown tokens": (lambda content: content["model"]["merges"].append(["zzz", "qqq"]), "cannot be loaded"),
    "unknown decoder": (lambda content: content.update(decoder={"type": "Nonsense"}), "cannot be loaded"),
    "stalling pattern": (lambda content: content.update(pre_tokenizer=SPLIT), "unknown pattern '.*'; allowed are"),
    "stalling pattern, nested": (
        lambda content: content["pre_tokenizer"]["pretokenizers"].append(
            {"type": "Sequence", "pretokenizers": [SPLIT]}
        ),
        "pre_tokenizer has the unknown pattern",
    ),
    "stalling normalizer": (
        lambda content: content.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
        "normalizer has the unknown pattern",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_bad_content(folder, name):
    change, message = EDITS[name]
    _edit(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        DeepseekV3Tokenizer.from_pretrained(folder)
    assert str(folder / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe garbage", b"{", b"[]", b"3", b"[" * 100_000])
def test_not_a_json_object(folder, file, data):
    (folder / file).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        DeepseekV3Tokenizer.from_pretrained(folder)
    assert str(folder / file) in str(caught.value)


def test_wrong_type_in_config(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": 5}')
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        DeepseekV3Tokenizer.from_pretrained(folder)


def test_no_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        DeepseekV3Tokenizer.from_pretrained(tmp_path)


def test_panic_of_the_library_becomes_a_value_error(folder, monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    def fail(self, *args, **kwargs):
        raise panic("onig: retry limit")

    monkeypatch.setattr(PreTrainedTokenizerFast, "__init__", fail)
    with pytest.raises(ValueError, match="tokenizer.json.*onig: retry limit"):
        DeepseekV3Tokenizer.from_pretrained(folder)


def test_interrupt_is_not_swallowed(folder, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "__init__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        DeepseekV3Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("digits", ["\\p{N}{1,3}", "\\p{N}"])
def test_cl100k_patterns_are_accepted(folder, digits):
    """Llama 3's and Qwen's pattern, which V3-shaped models of others use."""
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" + digits + "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    _edit(folder, lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=pattern))
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert DeepseekV3Tokenizer.from_pretrained(folder)("It's 1234!").input_ids == raw.encode("It's 1234!").ids


def test_split_patterns_stay_fast_on_awkward_text(trained):
    """What stalls a backtracking engine: long runs that almost match. Oniguruma would panic, not only be slow."""
    for run in ("a", " ", "\n", " \n", "1", "!", "\u0301", "\t", "中"):
        assert trained(run * 20_000 + "\x00").input_ids


def test_only_tokenizer_json_is_read(trained, tmp_path):
    """And a folder without it is told from one that is not there."""
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (tmp_path / "tiktoken.model").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}: found no tokenizer.json; code of the repository's own is not"):
        load_tokenizer(tmp_path)
    trained.save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)) is DeepseekV3Tokenizer
    with pytest.raises(OSError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
