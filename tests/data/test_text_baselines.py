"""The n-gram model is checked against a slow dictionary version of Chen and Goodman's definition."""

import gzip
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data import (
    Document,
    bits_per_byte,
    document_bytes,
    gzip_bits_per_byte,
    ngram_bits_per_byte,
    xz_bits_per_byte,
)
from deepseek_v3.data.ngram import NgramModel, _discounts

START, END = "<s>", "</s>"


class DictKneserNey:
    def __init__(self, docs, vocab_size, order):
        self.order, self.outcomes = order, vocab_size + 1
        sentences = [(START, *doc, END) for doc in docs]
        raw = [Counter(s[i : i + k] for s in sentences for i in range(len(s) - k + 1)) for k in range(1, order + 1)]
        self.counts = []
        for k in range(1, order + 1):
            counts = dict(raw[k - 1])
            if k < order:
                left = Counter(gram[1:] for gram in raw[k])
                counts = {gram: c if gram[0] == START else left[gram] for gram, c in counts.items()}
            counts.pop((START,), None)
            self.counts.append(counts)
        self.discounts = [_discounts(np.array(list(counts.values()))) for counts in self.counts]
        self.continuations = [defaultdict(list) for _ in range(order)]
        for k, counts in enumerate(self.counts):
            for gram, c in counts.items():
                self.continuations[k][gram[:-1]].append(c)

    def probability(self, history, word, k=None):
        k = self.order if k is None else k
        if k == 0:
            return 1 / self.outcomes
        history = tuple(history)
        lower = self.probability(history, word, k - 1)
        if len(history) < k - 1:
            return lower
        context = history[len(history) - (k - 1) :]
        followers = self.continuations[k - 1].get(context)
        if not followers:
            return lower
        discount = self.discounts[k - 1]
        count = self.counts[k - 1].get((*context, word), 0)
        freed = sum(discount[min(c, 3)] for c in followers)
        return (count - discount[min(count, 3)]) / sum(followers) + freed / sum(followers) * lower


def skewed_documents(rng, n, vocab_size):
    return [np.minimum(rng.geometric(0.25, rng.integers(0, 40)) - 1, vocab_size - 1) for _ in range(n)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_matches_the_dictionary_version(order):
    rng = np.random.default_rng(order)
    train, heldout = skewed_documents(rng, 30, 12), skewed_documents(rng, 8, 14)
    model, slow = NgramModel(train, 14, order), DictKneserNey(train, 14, order)
    expected = []
    for doc in heldout:
        words = (START, *doc.tolist(), END)
        expected += [-math.log(slow.probability(words[:i], words[i])) for i in range(1, len(words))]
    np.testing.assert_allclose(model.token_nats(heldout), expected, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    train=st.lists(st.lists(st.integers(0, 5), max_size=15), min_size=1, max_size=8),
    contexts=st.lists(st.lists(st.integers(0, 7), max_size=7), min_size=1, max_size=4),
    order=st.integers(1, 5),
)
def test_probabilities_sum_to_one_after_any_context(train, contexts, order):
    model = NgramModel(train, 8, order)
    for context in [*contexts, train[0][:4], []]:
        distribution = model.distribution(context)
        assert distribution.shape == (9,) and distribution.min() > 0
        assert abs(distribution.sum() - 1) < 1e-12


def test_discounts_by_hand():
    # n1..n4 = 4, 2, 1, 1: Y = 4 / (4 + 2 * 2) = 0.5; zeros (the start symbol) do not count.
    assert _discounts(np.array([0, 1, 1, 1, 1, 2, 2, 3, 4, 9])).tolist() == [0, 0.5, 1.25, 1]
    assert _discounts(np.array([1, 1, 7])).tolist() == [0, 0.5, 1, 1.5]


def test_token_nats_and_distribution_agree():
    rng = np.random.default_rng(0)
    model = NgramModel(skewed_documents(rng, 40, 10), 10)
    doc = [0, 1, 0, 2, 9, 0, 0, 3]
    one_by_one = [-math.log(model.distribution(doc[:i])[t]) for i, t in enumerate([*doc, model.end_id])]
    np.testing.assert_allclose(model.token_nats([doc]), one_by_one, rtol=1e-12)
    two = model.token_nats([doc, doc])
    np.testing.assert_array_equal(two, np.tile(model.token_nats([doc]), 2))  # nothing leaks across documents


def test_large_vocabulary_does_not_overflow():
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 129_280, 5000) for _ in range(4)]
    nats = NgramModel(docs, 129_280).token_nats(docs[:1])
    assert np.isfinite(nats).all() and nats[5:-1].mean() < 3 < math.log(129_280)


def test_ngram_errors():
    with pytest.raises(ValueError, match="no documents"):
        NgramModel([], 4)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 4\), found 1 to 4"):
        NgramModel([[1, 4]], 4)
    with pytest.raises(ValueError, match="order must be at least 1, found 0"):
        NgramModel([[1]], 4, order=0)


def test_bits_per_byte_is_bits_over_bytes():
    assert bits_per_byte(math.log(2) * 12, 6) == pytest.approx(2)
    with pytest.raises(ValueError, match="n_bytes must be positive, found 0"):
        bits_per_byte(1.0, 0)


def test_compressors_count_the_archive():
    docs = [Document("a", "the quick brown fox é " * 20), Document("b", "jumps over the lazy dog")]
    data = "".join(doc.text for doc in docs).encode()
    assert gzip_bits_per_byte(docs) == pytest.approx(8 * len(gzip.compress(data, 9)) / len(data))
    assert xz_bits_per_byte(docs, training=docs) < xz_bits_per_byte(docs) / 2


def test_uniform_bytes_cost_eight_bits_and_text_less():
    rng = np.random.default_rng(0)
    noise, more = [rng.integers(0, 256, 20_000)], [rng.integers(0, 256, 2_000)]
    assert 8 < ngram_bits_per_byte(noise, more, vocab_size=256, heldout_bytes=2_000, order=1) < 8.05
    docs = [Document("a", "".join(f"{i} bottles on the wall, {i} bottles\n" for i in range(500)))]
    held = [Document("b", "".join(f"{i} bottles on the wall, {i} bottles\n" for i in range(500, 520)))]
    n_bytes = len(held[0].text.encode())
    assert ngram_bits_per_byte(document_bytes(docs), document_bytes(held), vocab_size=256, heldout_bytes=n_bytes) < 1.2
