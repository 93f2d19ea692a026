"""Tokenizers that a run can and cannot use, said before the work; documents read back from the packed stream."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.data import load_corpus, pack_documents, tokenize_documents
from deepseek_v3.tokenization import DeepseekV3Tokenizer, train_tokenizer
from deepseek_v3.tokenization.vocabulary import BOS, EOS, PAD
from deepseek_v3.training import pretrain, text
from deepseek_v3.training.evaluation import write_samples
from deepseek_v3.training.text import documents
from tests.training.helpers import fast_finish, tiny_model, tiny_recipe


@pytest.fixture
def tokenizer_without(tmp_path: Path, corpus: Path) -> Callable[[str], str]:
    """The folder of a tokenizer of 512 ids that has other names for the tokens given."""

    def make(*tokens: str) -> str:
        texts = (document.text for document in load_corpus(corpus, heldout_fraction=0.3).train)
        train_tokenizer(texts, 512).save_pretrained(tmp_path / "tokenizer")
        for file in (tmp_path / "tokenizer").glob("*.json"):
            content = file.read_text().replace('"add_bos_token": true', '"add_bos_token": false')
            for token in tokens:
                content = content.replace(token, "<|other|>")
            lines = content.splitlines()
            file.write_text("\n".join(line for line in lines if '_token": "<|other|>"' not in line))
        return str(tmp_path / "tokenizer")

    return make


@pytest.fixture
def no_tokenization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "tokenize_documents", lambda *_: pytest.fail("the corpus was tokenized"))


@pytest.mark.parametrize(("token", "name"), [(BOS, "bos_token"), (EOS, "eos_token")])
def test_a_tokenizer_without_document_marks_is_refused(
    tmp_path: Path, corpus: Path, no_tokenization: None, tokenizer_without: Callable, token: str, name: str
) -> None:
    folder = tokenizer_without(token)
    with pytest.raises(ValueError, match=f"{folder}: {name} is not set"):
        pretrain(tiny_recipe(tmp_path / "run", corpus, tokenizer=folder))


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_a_model_with_other_document_marks_than_the_tokenizer_is_refused(
    tmp_path: Path, corpus: Path, no_tokenization: None, tokenizer_without: Callable, name: str
) -> None:
    folder = tokenizer_without()
    known = getattr(DeepseekV3Tokenizer.from_pretrained(folder), name)
    recipe = tiny_recipe(tmp_path / "run", corpus, tokenizer=folder, model={"vocab_size": 512, name: 7})
    with pytest.raises(ValueError, match=f"{folder}: {name} is {known}, .* model has 7"):
        pretrain(recipe)


def test_a_tokenizer_beyond_the_model_s_vocabulary_is_refused(
    tmp_path: Path, corpus: Path, no_tokenization: None, tokenizer_without: Callable
) -> None:
    recipe = tiny_recipe(tmp_path / "run", corpus, tokenizer=tokenizer_without(), model={"vocab_size": 400})
    with pytest.raises(ValueError, match="has id 511, but config.vocab_size is 400"):
        pretrain(recipe)


@pytest.mark.parametrize(("bos", "eos"), [("true", "true"), ("false", "false")])
def test_samples_begin_as_a_training_row_does(tokenizer_without: Callable, bos: str, eos: str) -> None:
    """Whatever the tokenizer's settings put around a text."""
    model = tiny_model(vocab_size=512)
    expected = write_samples(model, DeepseekV3Tokenizer.from_pretrained(tokenizer_without()), ["abc"], 4)
    folder = Path(tokenizer_without())
    file = folder / "tokenizer_config.json"
    settings = {"add_bos_token": bos == "true", "add_eos_token": eos == "true"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    tokenizer = DeepseekV3Tokenizer.from_pretrained(folder)
    (plain,) = tokenize_documents(["abc"], tokenizer)
    assert len(tokenizer("abc")["input_ids"]) == len(plain) + (bos == "true") + (eos == "true")
    began: list[list[int]] = []
    generate = model.generate
    model.generate = lambda ids, **options: (began.append(ids[0].tolist()), generate(ids, **options))[1]
    assert write_samples(model, tokenizer, ["abc"], 4) == expected
    assert began == [[tokenizer.bos_token_id, *plain.tolist()]] * 2


@pytest.mark.parametrize("pad", [EOS, BOS])
def test_a_document_mark_that_pads_is_trained(
    tmp_path: Path, corpus: Path, tokenizer_without: Callable, monkeypatch: pytest.MonkeyPatch, pad: str
) -> None:
    """`nn.Embedding` gives its padding token no gradient; packed text holds EOS and BOS and no padding."""
    fast_finish(monkeypatch)
    folder = Path(tokenizer_without(PAD))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": pad}))
    pretrain(tiny_recipe(tmp_path / "run", corpus, tokenizer=str(folder), steps=1))
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = DeepseekV3Tokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.pad_token == pad and model.config.pad_token_id is None
    assert model.model.embed_tokens.weight[tokenizer.pad_token_id].any()


def test_documents_of_a_packed_stream(corpus: Path, tokenizer_without: Callable) -> None:
    tokenizer = DeepseekV3Tokenizer.from_pretrained(tokenizer_without())
    texts = ["", *(document.text for document in load_corpus(corpus, heldout_fraction=0.3).train)]
    expected = list(tokenize_documents(texts, tokenizer))
    for options in ({}, {"evaluation": True, "context": 7}):
        packed = pack_documents(expected, 32, bos_id=0, eos_id=1, **options)
        found = documents(packed)
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert np.array_equal(one, two) and one.dtype == np.uint16 and one.base is not None
