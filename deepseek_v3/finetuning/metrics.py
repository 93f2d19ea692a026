"""The figures of fine-tuning, each defined once; reports.py puts intervals to them.

Shapes: N items, C classes, R resamples. Every metric takes `weights` [..., N]: how often each item counts. Without
weights it is the plain figure; with the counts of R bootstrap resamples [R, N] it is R figures in one pass. Tests
compare each with scikit-learn's `sample_weight`. Classes are integers 0..C-1; of two, class 1 is the positive one.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from ..data import bits_per_byte

Array = np.ndarray
ECE_BINS = 15


def weighted_mean(values: Array, weights: Array | None = None) -> Array:
    """Mean of values [N] over items -> [...]."""
    return _sums(np.asarray(values, dtype=np.float64), weights) / _sums(np.ones(len(values)), weights)


def accuracy(labels: Array, predictions: Array, weights: Array | None = None) -> Array:
    """Share of items whose predicted class is right; labels and predictions integer [N]."""
    return weighted_mean(labels == predictions, weights)


def macro_f1(labels: Array, predictions: Array, n_classes: int, weights: Array | None = None) -> Array:
    """Mean F1 of the classes that occur, among the labels or the predictions; labels and predictions integer [N].

    scikit-learn's `f1_score(average="macro")` with its default `labels`.
    """
    truth, predicted = _one_hot(labels, n_classes), _one_hot(predictions, n_classes)
    hits, total = _sums(truth * predicted, weights), _sums(truth + predicted, weights)
    return _nan_mean(_ratio(2 * hits, total))


def roc_auc(positive: Array, scores: Array, weights: Array | None = None) -> Array:
    """Area under the ROC curve: the chance that a positive item scores above a negative one, ties counting half.

    Args:
        positive: boolean [N].
        scores: [N], higher means more likely positive.

    Returns:
        [...]; NaN where only one class has weight.
    """
    scores = np.asarray(scores)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of the runs of equal scores
    counts = np.ones(len(scores)) if weights is None else weights
    ordered, is_positive = counts[..., order], np.asarray(positive, dtype=np.float64)[order]
    positives = np.add.reduceat(ordered * is_positive, starts, axis=-1)
    negatives = np.add.reduceat(ordered * (1 - is_positive), starts, axis=-1)
    below = np.cumsum(negatives, axis=-1) - negatives / 2
    pairs = positives.sum(-1) * negatives.sum(-1)
    return _ratio((positives * below).sum(-1), pairs)


def macro_roc_auc(labels: Array, probabilities: Array, weights: Array | None = None) -> Array:
    """Mean over the classes of the area of each against the rest; a class without an item is left out.

    Args:
        labels: integer [N].
        probabilities: [N, C]; of two classes, the area of class 1, which equals that of class 0.
    """
    n_classes = probabilities.shape[1]
    if n_classes == 2:
        return roc_auc(labels == 1, probabilities[:, 1], weights)
    areas = [roc_auc(labels == c, probabilities[:, c], weights) for c in range(n_classes)]
    return _nan_mean(np.stack(areas, axis=-1))


def sensitivity(positive: Array, flagged: Array, weights: Array | None = None) -> Array:
    """Recall of the positive class: share of the positive items [N] that are flagged [N]; NaN without any."""
    return _ratio(_sums(positive & flagged, weights), _sums(positive * 1.0, weights))


def specificity(positive: Array, flagged: Array, weights: Array | None = None) -> Array:
    """Share of the negative items that are not flagged; NaN without any."""
    return sensitivity(~positive, ~flagged, weights)


def threshold_at_recall(positive: Array, scores: Array, recall: float) -> float:
    """The highest threshold at which ``scores >= threshold`` finds at least the share `recall` of the positive items.

    Choose it on the validation split and use it on the test split.

    Raises:
        ValueError: no positive item, or `recall` outside (0, 1].
    """
    n_positive = int(positive.sum())
    if n_positive == 0 or not 0 < recall <= 1:
        raise ValueError(f"threshold_at_recall: needs recall in (0, 1], found {recall}, and positives: {n_positive}")
    needed = math.ceil(recall * n_positive - 1e-9)
    return float(np.sort(scores[positive])[n_positive - needed])


def review_rate_at_recall(positive: Array, scores: Array, recall: float, weights: Array | None = None) -> Array:
    """Share of all items that must be reviewed, from the highest score down, to find `recall` of the positive ones.

    The threshold is found on the same items: what a ranking could reach, while the share flagged at a threshold of
    `threshold_at_recall` is what it does reach. Items of one score are reviewed together. NaN without a positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)
    counts = np.ones(len(scores)) if weights is None else weights
    reviewed = np.cumsum(counts[..., order], axis=-1)[..., ends]
    found = np.cumsum((counts * positive)[..., order], axis=-1)[..., ends]
    total = found[..., -1:]
    first = np.argmax(found >= recall * total - 1e-9, axis=-1)[..., None]
    rate = np.take_along_axis(reviewed, first, axis=-1) / reviewed[..., -1:]
    return np.where(total > 0, rate, np.nan)[..., 0]


def least_cost_predictions(probabilities: Array, costs: Array) -> Array:
    """The class [N] of least expected cost under probabilities [N, C]; costs[true][predicted] is [C, C]."""
    return np.argmin(probabilities @ costs, axis=1)


def mean_cost(labels: Array, predictions: Array, costs: Array, weights: Array | None = None) -> Array:
    """Mean of ``costs[label, prediction]``: German credit's cost-weighted error, in units of its cost matrix."""
    return weighted_mean(costs[labels, predictions], weights)


def expected_calibration_error(labels: Array, probabilities: Array, weights: Array | None = None) -> Array:
    """Mean distance of confidence and accuracy over `ECE_BINS` bins of equal width in (0, 1] (Guo et al. 2017, eq. 3).

    Confidence is the probability of the predicted class. Bins of equal width, because they do not move between
    resamples. The figure is biased upwards, the more the fewer items a bin has, and a resample adds to it: read the
    upper end of its interval as an upper bound.
    """
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    return np.abs(_sums(gap[:, None] * _one_hot(bins, ECE_BINS), weights)).sum(-1) / _sums(np.ones(len(gap)), weights)


def brier_score(labels: Array, probabilities: Array, weights: Array | None = None) -> Array:
    """Mean squared error of probabilities [N, C] against the one-hot label, summed over the classes.

    Halved for two classes, where it is the usual ``(p - y)^2``; as scikit-learn's `brier_score_loss` does.
    """
    errors = ((probabilities - _one_hot(labels, probabilities.shape[1])) ** 2).sum(axis=1)
    return weighted_mean(errors / 2 if probabilities.shape[1] == 2 else errors, weights)


def perplexity(nats: Array, n_tokens: Array, weights: Array | None = None) -> Array:
    """exp of the mean negative log-likelihood per token; nats and n_tokens [N] are sums over the tokens of an item."""
    return np.exp(_sums(np.asarray(nats, dtype=np.float64), weights) / _sums(n_tokens * 1.0, weights))


def mean_bits_per_byte(nats: Array, n_bytes: Array, weights: Array | None = None) -> Array:
    """`data.bits_per_byte` of the items together; nats and n_bytes [N] per item."""
    totals = np.broadcast_arrays(_sums(np.asarray(nats, dtype=np.float64), weights), _sums(n_bytes * 1.0, weights))
    return np.vectorize(bits_per_byte)(*totals)


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> Array:
    """ROUGE-L F1 of each answer [N], by the rouge-score library, without stemming.

    Words are runs of a-z and 0-9, as in that library; any other letter or digit, such as a Chinese character, is a
    word of its own (the library's tokenizer would drop it).

    Raises:
        ValueError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE-L needs the rouge-score library: pip install rouge-score") from error

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, answers, strict=True)
    return np.array([scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs])


class _Words:
    """The tokenizer of `rouge_l`."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+|[^\W\x00-\x7f]", text.lower())


def _sums(values: Array, weights: Array | None) -> Array:
    """Weighted sums over the items: values [N, ...] -> [..., ...]."""
    return values.sum(axis=0, dtype=np.float64) if weights is None else weights @ values


def _one_hot(classes: Array, n_classes: int) -> Array:
    return np.eye(n_classes)[classes]


def _ratio(above: Array, below: Array) -> Array:
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


def _nan_mean(values: Array) -> Array:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))
