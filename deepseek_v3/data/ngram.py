"""An n-gram language model with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998), in NumPy.

The baseline that a neural model must beat on the same tokens. Tables are sorted integer keys, not dicts of tuples:
every distinct k-gram is a *node* of a trie, found by the key ``parent node * symbols + last symbol``, so a k-gram is
looked up in one `searchsorted` from the node of its prefix, for all positions of a text at once.

Each document is ``start, tokens, end``; n-grams never cross documents. As in KenLM, ``start`` is never predicted, and
n-grams that begin with it keep their plain counts (nothing can precede them); all other orders below the highest use
continuation counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_MISSING = -1  # node of a k-gram that training never saw, or that would cross the document's start


@dataclass(frozen=True)
class _Level:
    """The distinct k-grams of one order k, and how order k interpolates."""

    keys: np.ndarray  # [nodes] int64, sorted: parent node * symbols + last symbol
    discounted: np.ndarray  # [nodes] float64: (count - discount) / total count of the context
    backoff: np.ndarray  # [contexts] float64: mass left to order k - 1; 1 for a context without continuation

    def find(self, parents: np.ndarray, symbols: np.ndarray, n_symbols: int) -> np.ndarray:
        wanted = parents * n_symbols + symbols
        nodes = np.searchsorted(self.keys, wanted)
        nodes[nodes == len(self.keys)] = 0
        return np.where((parents != _MISSING) & (self.keys[nodes] == wanted), nodes, _MISSING)


class NgramModel:
    """Interpolated modified Kneser-Ney model of a given order.

    Args:
        token_docs: training documents as token ids in ``[0, vocab_size)``, without special tokens.
        vocab_size: outcomes are these ids and ``vocab_size`` itself, the end of the document.
        order: 5 for a 5-gram model.

    Raises:
        ValueError: no document, `order` below 1, or a token outside the vocabulary.
    """

    def __init__(self, token_docs: Iterable[Sequence[int] | np.ndarray], vocab_size: int, order: int = 5) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, found {order}")
        self.end_id = vocab_size
        self._start_id = vocab_size + 1
        self._n_symbols = vocab_size + 2
        self._levels: list[_Level] = []

        symbols, offsets = self._stream(token_docs)
        self.order = order = min(order, int(offsets.max()) + 1)  # no k-gram is longer than the longest document
        parents = np.zeros(len(symbols), dtype=np.int64)  # order 1: every symbol hangs from the root, node 0
        n_parents = 1
        grams = _distinct(parents, symbols, self._n_symbols)
        for k in range(1, order + 1):
            keys, first_seen, nodes, counts = grams
            if k < order:
                longer = _distinct(_shift(nodes), symbols, self._n_symbols, valid=offsets >= k)
                # Continuation count: each distinct (k+1)-gram counts once, for the k-gram it ends with.
                continuations = np.bincount(nodes[longer[1]], minlength=len(keys))
                counts = np.where(offsets[first_seen] == k - 1, counts, continuations)
            if k == 1:
                counts = np.where(keys == self._start_id, 0, counts)
            self._levels.append(_smooth(keys, counts, n_parents, self._n_symbols))
            if k < order:
                n_parents, grams = len(keys), longer

    def token_nats(self, token_docs: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
        """``-ln P`` of every token and every document end, in order: float64 ``[sum(len(doc) + 1)]``, in nats."""
        symbols, offsets = self._stream(token_docs)
        contexts = [np.zeros(len(symbols), dtype=np.int64)]
        for level in self._levels[:-1]:  # contexts across documents drop out: no trained k-gram holds "end start"
            contexts.append(_shift(level.find(contexts[-1], symbols, self._n_symbols)))
        probabilities = self._interpolate(contexts, symbols)
        return -np.log(probabilities[offsets > 0])

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """P(outcome | the tokens of one document so far): float64 ``[vocab_size + 1]``, the last is the end."""
        history = np.array([self._start_id, *context], dtype=np.int64)
        outcomes = np.arange(self.end_id + 1)
        contexts = []
        for length in range(self.order):
            node = np.zeros(1, dtype=np.int64) if length <= len(history) else np.array([_MISSING])
            for level, symbol in zip(self._levels, history[len(history) - length :] if length else (), strict=False):
                node = level.find(node, np.array([symbol]), self._n_symbols)
            contexts.append(np.repeat(node, len(outcomes)))
        return self._interpolate(contexts, outcomes)

    def _interpolate(self, contexts: list[np.ndarray], symbols: np.ndarray) -> np.ndarray:
        """P(symbol | context) from the uniform distribution up; contexts[k - 1] are the nodes of k - 1 symbols."""
        probabilities = np.full(len(symbols), 1 / (self.end_id + 1))
        for level, context in zip(self._levels, contexts, strict=True):
            node = level.find(context, symbols, self._n_symbols)
            own = np.where(node == _MISSING, 0.0, level.discounted[node])
            probabilities = own + np.where(context == _MISSING, 1.0, level.backoff[context]) * probabilities
        return probabilities

    def _stream(self, token_docs: Iterable[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All documents with start and end symbols, and each symbol's offset in its document: int64 ``[symbols]``."""
        docs = [np.asarray(doc, dtype=np.int64) for doc in token_docs]
        if not docs:
            raise ValueError("NgramModel: no documents")
        tokens = np.concatenate(docs)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.end_id):
            raise ValueError(
                f"NgramModel: tokens must lie in [0, {self.end_id}), found {tokens.min()} to {tokens.max()}"
            )
        symbols = np.concatenate([part for doc in docs for part in ([self._start_id], doc, [self.end_id])])
        offsets = np.concatenate([np.arange(len(doc) + 2) for doc in docs])
        return symbols, offsets


def _shift(nodes: np.ndarray) -> np.ndarray:
    """Nodes of the k-grams that end one position earlier."""
    return np.concatenate(([_MISSING], nodes[:-1]))


def _distinct(
    parents: np.ndarray, symbols: np.ndarray, n_symbols: int, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (parent, symbol) pairs: sorted keys, first position, node at each position, count."""
    positions = np.arange(len(symbols)) if valid is None else np.flatnonzero(valid)
    keys, first, inverse, counts = np.unique(
        parents[positions] * n_symbols + symbols[positions], return_index=True, return_inverse=True, return_counts=True
    )
    nodes = np.full(len(symbols), _MISSING, dtype=np.int64)
    nodes[positions] = inverse
    return keys, positions[first], nodes, counts


def _smooth(keys: np.ndarray, counts: np.ndarray, n_parents: int, n_symbols: int) -> _Level:
    """Discount the counts of one order and record the mass each context hands to the order below."""
    parents = keys // n_symbols
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.bincount(parents, weights=counts, minlength=n_parents)
    freed = np.bincount(parents, weights=discounts, minlength=n_parents)
    seen = totals > 0
    backoff = np.divide(freed, totals, out=np.ones(n_parents), where=seen)
    discounted = np.divide(counts - discounts, totals[parents], out=np.zeros(len(keys)), where=seen[parents])
    return _Level(keys, discounted, backoff)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts 0, 1, 2 and 3+ from the counts of counts (Chen and Goodman, equation 26)."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3):  # too little text to estimate; KenLM's fallback
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2)
    estimated = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    # A discount outside [0, count] would make a probability negative; only tiny or artificial texts reach the clip.
    return np.array([0.0, *(float(np.clip(d, 0.0, c)) for c, d in enumerate(estimated, start=1))])
