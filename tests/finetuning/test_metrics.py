"""Metrics against scikit-learn, scipy and the rouge-score library, weighted and not; intervals by their coverage."""

import json
import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from deepseek_v3.data import bits_per_byte
from deepseek_v3.finetuning import metrics as m
from deepseek_v3.finetuning.reports import (
    bootstrap,
    class_indices,
    classification_report,
    over_seeds,
    text_report,
)

N = 80
COSTS = np.array([[0.0, 1.0], [5.0, 0.0]])


def classes(n_classes, n=N, seed=0):
    """(labels [n], probabilities [n, C] with ties)."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(n, n_classes)), 1)
    labels = rng.integers(n_classes, size=n)
    logits[np.arange(n), labels] += 0.5
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def counts(n=N, rows=7):
    return np.random.default_rng(1).multinomial(n, [1 / n] * n, size=rows).astype(float)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_metrics_equal_sklearn_with_and_without_weights(n_classes):
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    labels, probabilities = classes(n_classes)
    predictions = probabilities.argmax(1)
    scores = probabilities[:, 1] if n_classes == 2 else probabilities
    auc = partial(sk.roc_auc_score, labels, scores, multi_class="ovr", average="macro")
    theirs = {
        "accuracy": partial(sk.accuracy_score, labels, predictions),
        "macro_f1": partial(sk.f1_score, labels, predictions, average="macro"),
        "auc": auc,
        "brier": partial(sk.brier_score_loss, labels, scores),
    }
    ours = {
        "accuracy": partial(m.accuracy, labels, predictions),
        "macro_f1": partial(m.macro_f1, labels, predictions, n_classes),
        "auc": partial(m.macro_roc_auc, labels, probabilities),
        "brier": partial(m.brier_score, labels, probabilities),
    }
    if n_classes == 2:
        theirs["recall"] = partial(sk.recall_score, labels, predictions)
        theirs["specificity"] = partial(sk.recall_score, labels, predictions, pos_label=0)
        ours["recall"] = partial(m.sensitivity, labels == 1, predictions == 1)
        ours["specificity"] = partial(m.specificity, labels == 1, predictions == 1)
    weights = counts()
    for name, metric in ours.items():
        assert float(metric()) == pytest.approx(theirs[name](), abs=1e-12), name
        expected = [theirs[name](sample_weight=row) for row in weights]
        np.testing.assert_allclose(metric(weights), expected, atol=1e-12, err_msg=name)


def test_macro_f1_and_auc_leave_out_classes_that_do_not_occur():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert m.macro_f1(labels, predictions, 3) == pytest.approx((2 / 3 + 4 / 5) / 2)
    only = np.array([[1.0, 1, 0, 0]])  # class 1 is never true but predicted once: F1 of 0 counts
    assert m.macro_f1(labels, predictions, 3, only) == pytest.approx([(2 / 3 + 0) / 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.4, 0.6, 0.0], [0.1, 0.9, 0.0]])
    assert m.macro_roc_auc(labels, probabilities) == pytest.approx((0.75 + 0.875) / 2)  # class 2 has no item
    assert math.isnan(m.roc_auc(np.array([True, True]), np.array([0.1, 0.2])))


def test_thresholds_and_review_rates_by_hand():
    scores = np.array([0.9, 0.8, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1])
    positive = np.array([1, 1, 0, 0, 1, 0, 1, 0], dtype=bool)
    for recall, threshold, rate in [(0.25, 0.9, 1 / 8), (0.5, 0.8, 3 / 8), (0.51, 0.4, 5 / 8), (1.0, 0.2, 7 / 8)]:
        assert m.threshold_at_recall(positive, scores, recall) == threshold
        flagged = scores >= threshold
        assert m.sensitivity(positive, flagged) >= recall
        assert m.weighted_mean(flagged) == m.review_rate_at_recall(positive, scores, recall) == rate
    twice = np.array([[2.0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(m.review_rate_at_recall(positive, scores, 0.5, twice), [2 / 8, np.nan])
    for wrong in [(~positive & positive, 0.5), (positive, 0.0), (positive, 1.1)]:
        with pytest.raises(ValueError, match="recall"):
            m.threshold_at_recall(wrong[0], scores, wrong[1])


def test_recall_with_a_fraction_that_floats_round_up():
    positive = np.ones(10, dtype=bool)
    assert m.threshold_at_recall(positive, np.arange(10.0), 0.7) == 3.0  # 0.7 * 10 is 7.000000000000001


def test_costs_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]])
    decisions = m.least_cost_predictions(probabilities, COSTS)
    assert decisions.tolist() == [0, 1, 1]  # a bad risk at 5 is refused from a probability of 1/6 on
    assert m.mean_cost(np.array([1, 0, 1]), decisions, COSTS) == pytest.approx(6 / 3)
    assert m.mean_cost(np.array([0, 1, 1]), decisions, COSTS, np.array([[3.0, 1, 0]])) == pytest.approx([0.0])


def test_calibration_error_by_hand_and_of_a_calibrated_source():
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.55, 0.45], [0.45, 0.55]])
    # bin of .9: accuracy 1/2, confidence .9, half the items; bin of .55: accuracy 1, confidence .55
    assert m.expected_calibration_error(np.array([0, 0, 0, 1]), probabilities) == pytest.approx(0.5 * 0.4 + 0.5 * 0.45)
    rng = np.random.default_rng(0)
    p = rng.uniform(size=200_000)
    both = np.stack([1 - p, p], axis=1)
    assert m.expected_calibration_error((rng.uniform(size=p.size) < p).astype(int), both) < 0.005
    overconfident = (rng.uniform(size=p.size) < 0.5 + (p - 0.5) / 2).astype(int)  # by half of |p - 1/2|, mean 1/4
    assert m.expected_calibration_error(overconfident, both) == pytest.approx(0.125, abs=0.005)


def test_language_figures_share_the_definition_of_data():
    nats, tokens, sizes = np.array([10.0, 20.0, 5.0]), np.array([5, 8, 2]), np.array([20, 40, 9])
    assert m.perplexity(nats, tokens) == pytest.approx(math.exp(35 / 15))
    assert m.mean_bits_per_byte(nats, sizes) == bits_per_byte(35.0, 69)
    weights = np.array([[1.0, 1, 1], [3, 0, 0], [0, 1, 2]])
    expected = [bits_per_byte(35.0, 69), bits_per_byte(30.0, 60), bits_per_byte(30.0, 58)]
    np.testing.assert_allclose(m.mean_bits_per_byte(nats, sizes, weights), expected)
    report = text_report(nats, tokens, sizes)
    assert (report["n"], report["n_tokens"], report["n_bytes"]) == (3, 15, 69)
    assert report["bits_per_byte"]["low"] < report["bits_per_byte"]["value"] < report["bits_per_byte"]["high"]


def test_rouge_l_equals_the_library_on_ascii_and_sees_chinese():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    reference, answer = "Take 2 tablets, daily; don't stop.", "Do not stop: take tablets daily"
    theirs = scorer.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert m.rouge_l([reference, "糖尿病的患者"], [answer, "糖尿病患者"]) == pytest.approx([theirs, 2 * 5 / 11])
    assert scorer.RougeScorer(["rougeL"]).score("糖尿病", "糖尿病")["rougeL"].fmeasure == 0


def test_bootstrap_equals_scipys_in_width():
    values = np.random.default_rng(0).exponential(size=120)
    ours = bootstrap({"mean": partial(m.weighted_mean, values)}, 120, resamples=20_000)["mean"]
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1, batch=1000)
    assert ours.value == values.mean() and ours.n == 120
    low, high = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_intervals_cover_the_truth_at_their_level():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        correct = rng.uniform(size=150) < 0.8
        found = bootstrap({"a": partial(m.weighted_mean, correct)}, 150, resamples=400)["a"]
        covered += found.low <= 0.8 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


def test_items_of_a_group_are_drawn_together():
    correct = np.repeat(np.random.default_rng(0).uniform(size=40) < 0.7, 25)  # 40 groups of 25 equal items
    groups = [f"g{i // 25:02d}" for i in range(1000)]
    statistic = {"a": partial(m.weighted_mean, correct)}
    items, grouped = bootstrap(statistic, 1000)["a"], bootstrap(statistic, 1000, groups=groups)["a"]
    few = bootstrap({"a": partial(m.weighted_mean, correct[::25])}, 40)["a"]
    assert (grouped.n, items.n) == (40, 1000) and grouped.value == items.value
    assert (grouped.low, grouped.high) == (few.low, few.high)
    assert grouped.high - grouped.low > 4 * (items.high - items.low)


def test_bootstrap_is_seeded_does_not_depend_on_blocks_and_pairs_models(monkeypatch):
    labels, probabilities = classes(2)
    statistic = {"auc": partial(m.macro_roc_auc, labels, probabilities)}
    first = bootstrap(statistic, N)
    assert first == bootstrap(statistic, N) != bootstrap(statistic, N, seed=1)
    monkeypatch.setattr("deepseek_v3.finetuning.reports._BLOCK", 100 * N)
    assert bootstrap(statistic, N)["auc"].low == pytest.approx(first["auc"].low)
    right, better = np.arange(N) % 2 == 0, np.arange(N) % 2 == 0
    better[1] = True  # one more item right: the difference is never negative

    def gain(weights):
        return m.weighted_mean(better, weights) - m.weighted_mean(right, weights)

    found = bootstrap({"gain": gain}, N)["gain"]
    assert found.low == 0 and found.value == pytest.approx(1 / N) and 0 < found.high < 6 / N


def test_over_seeds_is_students_interval():
    values = [0.70, 0.74, 0.78]
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.74, low, high, 3))
    with pytest.raises(ValueError, match="at least two values, found 1"):
        over_seeds([0.7])


def test_classification_report_of_two_classes():
    labels, probabilities = classes(2)
    report = classification_report(labels, probabilities, ("good", "bad"), threshold=0.3, costs=COSTS.tolist())
    flagged = probabilities[:, 1] >= 0.3
    values = {name: figure["value"] for name, figure in report.items() if isinstance(figure, dict) and "low" in figure}
    assert values["accuracy"] == pytest.approx(np.mean(flagged == labels))
    assert values["sensitivity"] == pytest.approx(np.mean(flagged[labels == 1]))
    assert values["specificity"] == pytest.approx(np.mean(~flagged[labels == 0]))
    assert values["review_rate"] == pytest.approx(flagged.mean())
    assert values["mean_cost"] == pytest.approx(np.mean(np.where(labels == 1, 5 * ~flagged, flagged)))
    assert set(values) == {
        "accuracy", "macro_f1", "roc_auc", "brier", "ece", "sensitivity", "specificity", "review_rate",
        "review_rate_at_recall", "mean_cost",
    }  # fmt: skip
    for name in values:
        assert report[name]["low"] <= values[name] <= report[name]["high"] or name == "ece"
    assert report["n"] == N and report["threshold"] == 0.3
    assert report["classes"]["bad"] == {"n": int(labels.sum()), "n_predicted": int(flagged.sum())}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_classification_report_says_none_where_a_figure_is_undefined():
    probabilities = np.full((5, 2), 0.5)
    report = classification_report(np.zeros(5, dtype=int), probabilities, ("no", "yes"), groups=list("aabbc"))
    assert report["roc_auc"] == {"value": None, "low": None, "high": None} == report["sensitivity"]
    assert report["accuracy"]["value"] == 1.0 and report["n_groups"] == 3
    json.dumps(report, allow_nan=False)
    one = text_report(np.array([10.0]), np.array([5]), np.array([20]))  # a lone text: no interval
    assert one["bits_per_byte"] == {"value": bits_per_byte(10.0, 20), "low": None, "high": None}


@pytest.mark.parametrize(
    "probabilities, options, message",
    [
        (np.full((4, 2), 0.5), {}, r"expected shape \(4, 3\), found \(4, 2\)"),
        (np.full((4, 3), 0.5), {}, "add up to 1"),
        (np.full((4, 3), np.nan), {}, "add up to 1"),
        (np.full((4, 3), 1 / 3), {"threshold": 0.5}, "two classes, found 3"),
        (np.full((4, 3), 1 / 3), {"groups": ["a"]}, "4 items and 1 groups"),
    ],
)
def test_reports_name_what_does_not_fit(probabilities, options, message):
    with pytest.raises(ValueError, match=message):
        classification_report(np.array([0, 1, 2, 0]), probabilities, ("a", "b", "c"), **options)


def test_class_indices():
    assert class_indices(["b", "a"], ("a", "b")).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"labels \['c'\] are not among the classes \['a', 'b'\]"):
        class_indices(["a", "c"], ("a", "b"))
