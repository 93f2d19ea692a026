"""Bits per byte and their intervals, against the figure of pretraining and against plain cross-entropy."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.data import heldout_bits_per_byte, load_corpus
from deepseek_v3.evaluation.estimates import ratio_of_sums
from deepseek_v3.evaluation.text import read_text, row_nats, text_anchors, text_results, text_rows
from tests.evaluation.helpers import tiny_model, tiny_tokenizer, write_text


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "corpus")


def test_a_whole_text_scores_as_in_pretraining(source: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = read_text(source)
    assert text.n_bytes == sum(len(path.read_bytes()) for path in Path(source).iterdir())
    rows = text_rows(text, tokenizer, length=32)
    results = text_results(model, rows)
    expected = heldout_bits_per_byte(model, rows.dataset, text.n_bytes, document_mask=False)
    assert results["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-6)
    assert results["rows"] == results["rows_of"] == results["bits_per_byte"]["n"] == len(rows.dataset)
    assert results["tokens"] == len(rows.dataset.stream) - len(rows.dataset.document_starts)
    assert results["bits_per_byte"]["low"] < expected < results["bits_per_byte"]["high"]


def test_rows_are_drawn_by_seed_and_scored_alone(source: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = read_text(source)
    rows = text_rows(text, tokenizer, length=32, rows=9, seed=3)
    assert len(set(rows.chosen)) == 9 and list(rows.chosen) == sorted(rows.chosen)
    assert np.array_equal(rows.chosen, text_rows(text, tokenizer, length=32, rows=9, seed=3).chosen)
    assert not np.array_equal(rows.chosen, text_rows(text, tokenizer, length=32, rows=9, seed=4).chosen)
    nats, tokens = row_nats(model, rows)
    for i, row in enumerate(rows.chosen):
        one = rows.dataset[int(row)]
        with torch.no_grad():
            logits = model(one["input_ids"][None]).logits[0, :-1].double()
        each = F.cross_entropy(logits, one["labels"][1:], ignore_index=-100, reduction="sum")
        assert nats[i] == pytest.approx(float(each), rel=1e-5)
        assert tokens[i] == (one["labels"][1:] != -100).sum()


def test_heldout_is_the_split_of_pretraining(source: str) -> None:
    corpus = load_corpus(source)
    text = read_text(f"heldout:{source}")
    assert [d.name for d in text.documents] == [d.name for d in corpus.heldout]
    assert [d.name for d in text.training] == [d.name for d in corpus.train]
    assert len(read_text(source).documents) == len(corpus.train) + len(corpus.heldout)
    assert read_text(source).training == ()
    assert text.sha256 != read_text(source).sha256


def test_anchors_are_those_of_the_whole_text(source: str) -> None:
    rows = text_rows(read_text(f"heldout:{source}"), tiny_tokenizer(), length=32, rows=1)
    anchors = text_anchors(rows, tiny_tokenizer())
    assert set(anchors) == {"gzip", "5-gram"} and 0 < anchors["5-gram"] < 8
    assert set(text_anchors(text_rows(read_text(source), tiny_tokenizer(), length=32), tiny_tokenizer())) == {"gzip"}


def test_a_source_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty.txt.*no document holds any text"):
        read_text(str(tmp_path / "empty.txt"))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        below = rng.integers(50, 100, size=60).astype(float)
        above = below * 2.0 + rng.normal(0, 20, size=60)
        figure = ratio_of_sums(above, below, seed)
        hits += figure["low"] < 2.0 < figure["high"]
    assert 180 <= hits <= 199


def test_undefined_figures_are_none() -> None:
    assert ratio_of_sums(np.zeros(0), np.zeros(0)) == {"value": None, "low": None, "high": None, "n": 0}
    assert ratio_of_sums(np.ones(3), np.zeros(3))["value"] is None
    assert ratio_of_sums(np.array([3.0]), np.array([2.0])) == {"value": 1.5, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize("rows", [0, -1])
def test_rows_count_from_one(source: str, rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows: found {rows}, allowed are whole numbers from 1"):
        text_rows(read_text(source), tiny_tokenizer(), length=32, rows=rows)


def test_names_hold_no_path(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(source).parent)
    names = {f"heldout:{source}": "corpus, held-out split", "heldout:./corpus": "corpus, held-out split"}
    names |= {source: "corpus", "./corpus/01.txt": "01.txt", "corpus/*.txt": "*.txt"}
    assert {given: read_text(given).name for given in names} == names
