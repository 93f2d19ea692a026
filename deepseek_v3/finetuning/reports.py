"""Intervals of the figures in metrics.py, and reports that hold them: what is written beside a trained model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from .metrics import (
    Array,
    accuracy,
    brier_score,
    expected_calibration_error,
    least_cost_predictions,
    macro_f1,
    macro_roc_auc,
    mean_bits_per_byte,
    mean_cost,
    perplexity,
    review_rate_at_recall,
    sensitivity,
    specificity,
    weighted_mean,
)

RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 8_000_000  # elements of one block of weights: 64 MB


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; `n` is the number of items, groups or seeds behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    statistics: Mapping[str, Callable[[Array | None], Array]],
    n_items: int,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Percentile intervals of figures over the items of a test set (Efron 1979): all from the same resamples.

    They say how far the figure would move with other items; seeds of training are another matter (`over_seeds`).

    Args:
        statistics: name -> function of weights ([R, N], or None for the figure itself) such as
            ``partial(accuracy, labels, predictions)``. For two models on the same items, a statistic that subtracts
            one's figure from the other's gives the interval of the difference.
        groups: [N], what each item hangs together with (a disease, a patient): groups are drawn whole, since items
            of one tell less than as many independent ones.

    Returns:
        name -> `Estimate`; `n` counts the groups where given. Resamples in which a figure is undefined (no positive
        item drawn) are left out of its interval. NaN where a figure, or the interval of a single item, is undefined.
    """
    _, group_of = np.unique(np.arange(n_items) if groups is None else np.asarray(groups), return_inverse=True)
    if len(group_of) != n_items or n_items == 0:
        raise ValueError(f"bootstrap: {n_items} items and {len(group_of)} groups")
    n_groups = int(group_of.max()) + 1
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Array]] = {name: [] for name in statistics}
    block = max(1, _BLOCK // n_items)
    for start in range(0, resamples, block):
        n_rows = min(block, resamples - start)
        picked = rng.integers(n_groups, size=(n_rows, n_groups)) + n_groups * np.arange(n_rows)[:, None]
        counts = np.bincount(picked.ravel(), minlength=n_rows * n_groups).reshape(n_rows, n_groups)
        weights = counts[:, group_of].astype(np.float64)
        for name, statistic in statistics.items():
            drawn[name].append(np.asarray(statistic(weights)))
    tail = (1 - level) / 2
    estimates = {}
    for name, statistic in statistics.items():
        values = np.concatenate(drawn[name])
        values = values[~np.isnan(values)]
        known = len(values) > 0 and n_groups > 1
        low, high = np.quantile(values, [tail, 1 - tail]) if known else (math.nan, math.nan)
        estimates[name] = Estimate(float(statistic(None)), float(low), float(high), n_groups)
    return estimates


def over_seeds(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of a figure over training seeds (or folds) with Student's t interval.

    Folds share training data, so that the interval of ten-fold cross-validation is somewhat too narrow.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy import stats

    if len(values) < 2:
        raise ValueError(f"over_seeds: an interval needs at least two values, found {len(values)}")
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return Estimate(mean, mean - half, mean + half, len(values))


def class_indices(labels: Sequence[str], class_names: Sequence[str]) -> Array:
    """Positions [N] of labels in `class_names`.

    Raises:
        ValueError: a label that is not among them.
    """
    position = {name: i for i, name in enumerate(class_names)}
    if unknown := sorted(set(labels) - set(position)):
        raise ValueError(f"labels {unknown} are not among the classes {list(class_names)}")
    return np.array([position[label] for label in labels], dtype=np.int64)


def classification_report(
    labels: Array,
    probabilities: Array,
    class_names: Sequence[str],
    threshold: float | None = None,
    *,
    recall: float = 0.9,
    costs: Sequence[Sequence[float]] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure of a classifier, with bootstrap intervals.

    Args:
        labels: integer [N]; see `class_indices`.
        probabilities: [N, C], rows adding up to 1.
        threshold: two classes: predict class 1 where its probability reaches it. None: the likelier class.
        recall: of `review_rate_at_recall`; two classes.
        costs: costs[true][predicted]. `mean_cost` is that of the decisions at `threshold`, or, where it is None, of
            the decisions of least expected cost.

    Returns:
        JSON-ready: ``n`` (items), ``n_groups`` if grouped, ``classes`` (name -> n, n predicted), ``threshold``, and
        per figure ``{"value", "low", "high"}``: accuracy, macro_f1, roc_auc, brier, ece, mean_cost if `costs`; with
        two classes also sensitivity, specificity, review_rate (share flagged) and review_rate_at_recall. An undefined
        figure is None.

    Raises:
        ValueError: shapes that do not fit, no probabilities, or a threshold with more than two classes.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    n_classes = len(class_names)
    if probabilities.shape != (len(labels), n_classes) or len(labels) == 0:
        raise ValueError(f"probabilities: expected shape {(len(labels), n_classes)}, found {probabilities.shape}")
    if not (np.all(probabilities >= 0) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-3)):
        raise ValueError("probabilities: expected rows of numbers from 0 that add up to 1")
    if threshold is not None and n_classes != 2:
        raise ValueError(f"a threshold needs two classes, found {n_classes}")
    if threshold is None:
        predictions = probabilities.argmax(axis=1)
    else:
        predictions = (probabilities[:, 1] >= threshold).astype(np.int64)
    statistics: dict[str, Callable[[Array | None], Array]] = {
        "accuracy": partial(accuracy, labels, predictions),
        "macro_f1": partial(macro_f1, labels, predictions, n_classes),
        "roc_auc": partial(macro_roc_auc, labels, probabilities),
        "brier": partial(brier_score, labels, probabilities),
        "ece": partial(expected_calibration_error, labels, probabilities),
    }
    if n_classes == 2:
        positive, flagged, scores = labels == 1, predictions == 1, probabilities[:, 1]
        statistics |= {
            "sensitivity": partial(sensitivity, positive, flagged),
            "specificity": partial(specificity, positive, flagged),
            "review_rate": partial(weighted_mean, flagged),
            "review_rate_at_recall": partial(review_rate_at_recall, positive, scores, recall),
        }
    if costs is not None:
        matrix = np.asarray(costs, dtype=np.float64)
        decisions = predictions if threshold is not None else least_cost_predictions(probabilities, matrix)
        statistics["mean_cost"] = partial(mean_cost, labels, decisions, matrix)
    there, found = (np.bincount(classes, minlength=n_classes).tolist() for classes in (labels, predictions))
    return {
        "n": len(labels),
        "classes": {name: {"n": there[c], "n_predicted": found[c]} for c, name in enumerate(class_names)},
        "threshold": threshold,
        **_as_json(bootstrap(statistics, len(labels), groups=groups, seed=seed), groups),
    }


def text_report(
    nats: Array, n_tokens: Array, n_bytes: Array, groups: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Perplexity and bits per byte of a test set from sums per item [N], with bootstrap intervals over the items."""
    statistics: dict[str, Callable[[Array | None], Array]] = {
        "perplexity": partial(perplexity, nats, n_tokens),
        "bits_per_byte": partial(mean_bits_per_byte, nats, n_bytes),
    }
    estimates = bootstrap(statistics, len(nats), groups=groups, seed=seed)
    counts = {"n": len(nats), "n_tokens": int(n_tokens.sum()), "n_bytes": int(n_bytes.sum())}
    return {**counts, **_as_json(estimates, groups)}


def _as_json(estimates: Mapping[str, Estimate], groups: Sequence[str] | None) -> dict[str, Any]:
    report: dict[str, Any] = {} if groups is None else {"n_groups": next(iter(estimates.values())).n}
    for name, estimate in estimates.items():
        figures = asdict(estimate)
        report[name] = {key: None if math.isnan(figures[key]) else figures[key] for key in ("value", "low", "high")}
    return report
