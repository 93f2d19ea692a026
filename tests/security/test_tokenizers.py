"""Hostile tokenizer folders. What `tests/tokenization/test_files.py` refuses by content is not repeated; here are the
files whose cost lies in sizes, and the ones that stall or end the process while a text is encoded."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deepseek_v3 import DeepseekV3Tokenizer
from deepseek_v3.finetuning.build import load_tokenizer
from deepseek_v3.tokenization import check_vocab
from tests.security.conftest import edit
from tests.security.limits import assert_cheap, assert_refused, limited

WORDS = "The quick brown fox jumps over the lazy dog. " * 20
SMALL_OBJECTS = '{"a": [' + "[]," * 3_000_000 + "[]]}"


def use(folder: Path):
    def load() -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer(WORDS).input_ids)

    return load


def test_the_undamaged_tokenizer_works_within_the_limits(checkpoint) -> None:
    outcome = limited(use(checkpoint))
    assert outcome.loaded, str(outcome)
    assert_cheap(outcome)


PADDING = {"direction": "Right", "pad_id": 2, "pad_type_id": 0, "pad_token": "<｜▁pad▁｜>", "pad_to_multiple_of": None}
PADDING |= {"strategy": "BatchLongest"}
TRUNCATION = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}


def template(single: list, ids: list) -> dict:
    special = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": [A, B], "special_tokens": special}


def replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def added(count: int) -> list:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": f"<{i}>", "special": True, **flags} for i in range(600, 600 + count)]


def nested(depth: int) -> dict:
    node: dict = {"type": "Sequence", "pretokenizers": []}
    for _ in range(depth):
        node = {"type": "Sequence", "pretokenizers": [node]}
    return node


X = {"SpecialToken": {"id": "x", "type_id": 0}}
TOKENIZERS = {
    "padded to 10^10": ({"padding": {**PADDING, "strategy": {"Fixed": 10**10}}}, "padding.strategy is 10000000000"),
    "padded to true": ({"padding": {**PADDING, "strategy": {"Fixed": True}}}, "padding.strategy is True"),
    "multiple of 2^40": ({"padding": {**PADDING, "pad_to_multiple_of": 2**40}}, "pad_to_multiple_of is 1099511627776"),
    "padding id": ({"padding": {**PADDING, "pad_id": 2**31}}, "padding.pad_id is 2147483648"),
    "truncation": ({"truncation": TRUNCATION | {"max_length": 2, "stride": 5}}, "tokenizer stride set to 5"),
    "an empty pattern": ({"normalizer": replace("", "a" * 10**6)}, "normalizer replaces ('', 'aaa"),
    "a short empty pattern": ({"normalizer": replace("", "a")}, "normalizer replaces"),
    "a growing text": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aaaaaaaaaa")] * 10}},
        "normalizer replaces ('a', 'aaaaaaaaaa')",
    ),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "ab"}}, "normalizer prepends 'ab'"),
    "precompiled": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "is a 'Precompiled'"),
    "decoder": ({"decoder": replace("", "b")}, "decoder replaces"),
    "a thousand marks": ({"post_processor": template([X] * 1000 + [A], [0] * 5000)}, "post_processor has a list of"),
    "ids without a token": ({"post_processor": template([X, A], [2**31])}, "post_processor adds ids [2147483648]"),
    "deep": ({"pre_tokenizer": nested(100)}, "pre_tokenizer is nested too deeply"),
    "very deep": ({"pre_tokenizer": nested(300)}, "pre_tokenizer is nested too deeply"),
    "many added tokens": ({"added_tokens": added(20_000)}, "added_tokens has 20000 entries, allowed are 16384"),
    "no version": ({"version": "9"}, "Unknown tokenizer version"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_is_refused(name: str, folder) -> None:
    values, message = TOKENIZERS[name]
    edit(folder / "tokenizer.json", **values)
    assert_refused(limited(use(folder)), folder / "tokenizer.json", message)


def test_long_suffix_of_words_is_refused(folder) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(folder / "tokenizer.json", model=content["model"] | {"end_of_word_suffix": "x" * 10**6})
    assert_refused(limited(use(folder)), folder / "tokenizer.json", "model.end_of_word_suffix has over")


ACCEPTED = {
    "padding and truncation of an ordinary size": {
        "padding": {**PADDING, "strategy": {"Fixed": 512}},
        "truncation": TRUNCATION,
    },
    "SentencePiece's spaces": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]},
        "decoder": replace("▁", " "),
    },
    "nothing": {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None},
    "an empty split": {
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    },
    "a thousand added tokens": {"added_tokens": added(1000)},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_harmless_tokenizer_works(name: str, folder) -> None:
    edit(folder / "tokenizer.json", **ACCEPTED[name])
    outcome = limited(use(folder))
    assert outcome.loaded, str(outcome)
    assert_cheap(outcome)


CONFIGS = {
    "padding": ({"tokenizer_padding": {"length": 10**10, "direction": "right"}}, "tokenizer_padding"),
    "truncation": ({"tokenizer_truncation": {"max_length": 1}}, "tokenizer_truncation"),
    "object": ({"tokenizer_object": {"a": 1}}, "tokenizer_object"),
    "post_processor": ({"post_processor": "x"}, "post_processor"),
    "gguf": ({"gguf_file": "../x.gguf"}, "gguf_file"),
    "length is text": ({"model_max_length": "big"}, "model_max_length is 'big'"),
    "length is negative": ({"model_max_length": -1}, "model_max_length is -1"),
    "length is true": ({"model_max_length": True}, "model_max_length is True"),
    "many extra tokens": ({"extra_special_tokens": ["<x>"] * 50_000}, "extra_special_tokens has 50000"),
    "old name": ({"additional_special_tokens": ["<x>"] * 50_000}, "additional_special_tokens has 50000"),
    "added id": ({"added_tokens_decoder": {str(2**40): {"content": "<zz>"}}}, "has id '1099511627776'"),
    "negative id": ({"added_tokens_decoder": {"-5": {"content": "<zz>"}}}, "has id '-5'"),
    "digits": ({"added_tokens_decoder": {"9" * 5000: {"content": "<zz>"}}}, "has id '999"),
    "added list": ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object"),
    "long template": ({"chat_template": "x" * 10**7}, "chat_template has 10000000 characters"),
    "template is a number": ({"chat_template": 5}, "chat_template is a int"),
    "templates": ({"chat_template": [{"name": "default", "template": 7}]}, "chat_template is a int"),
    "templates without names": ({"chat_template": ["x"]}, "chat_template is a list"),
    "side": ({"padding_side": "up"}, "Padding side"),
    "self": ({"self": 1}, "self"),
    "a method": ({"encode": "x"}, "encode"),
    "a dunder": ({"__class__": "x"}, "__class__"),
    "token of another type": ({"bos_token": {"__type": "AddedToken", "content": 5}}, ""),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_configuration_is_refused(name: str, folder) -> None:
    values, message = CONFIGS[name]
    edit(folder / "tokenizer_config.json", **values)
    assert_refused(limited(use(folder)), folder, "tokenizer_config.json", message)


@pytest.mark.parametrize("values", [{"tokenizer_file": "/etc/passwd"}, {"vocab_file": "../../.env"}], ids=str)
def test_paths_in_the_configuration_are_not_followed(values: dict, folder, tmp_path) -> None:
    """A folder must not read, and later save, files from elsewhere."""
    edit(folder / "tokenizer_config.json", **values)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    tokenizer.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} <= {file.name for file in folder.iterdir()}


FILES = {
    "special_tokens_map.json": ["{", "[]", "[" * 100_000, SMALL_OBJECTS],
    "added_tokens.json": ["{", "[]", SMALL_OBJECTS],
    "tokenizer.json": [SMALL_OBJECTS, " " * (2**26 + 1)],
    "chat_template.jinja": ["x" * 2**18],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, texts in FILES.items() for i in range(len(texts))])
def test_other_files_are_refused_by_name(name: str, number: int, folder) -> None:
    (folder / name).write_text(FILES[name][number])
    assert_refused(limited(lambda: DeepseekV3Tokenizer.from_pretrained(folder)), folder / name)


def test_template_that_is_not_text_is_refused(folder) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert_refused(limited(use(folder)), folder / "chat_template.jinja", "not UTF-8")


def test_ids_beyond_the_models_vocabulary_are_refused(checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    check_vocab(tokenizer, 600)
    with pytest.raises(ValueError, match="has id 599, but config.vocab_size is 599"):
        check_vocab(tokenizer, 599)


def test_fine_tuning_names_the_base(folder) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert_refused(limited(lambda: load_tokenizer(str(folder))), f"base {folder}")
    (folder / "evil.py").write_text("raise SystemExit(7)")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": "evil.T"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="Evil")
    assert_refused(limited(lambda: load_tokenizer(str(folder))), f"base {folder}")
