"""What a fine-tuned model has to beat: class frequencies, TF-IDF, the table behind the sentences, retrieval.

Each classifier returns probabilities of the validation and the test split, so that the figures and thresholds of
reports.py apply to it as to a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from .batches import Row, conversation
from .metrics import Array
from .reports import class_indices
from .tasks import TaskData, TaskRow, prompt_of

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)  # inverse strength of the L2 penalty


@dataclass(frozen=True)
class Baseline:
    """Probabilities of one classifier, its columns in the order of the task's labels.

    Attributes:
        validation, test: float64 [N, C].
        settings: what was chosen on the validation split.
    """

    name: str
    validation: Array
    test: Array
    settings: dict[str, Any]


def classification_baselines(task: TaskData, seed: int = 0) -> list[Baseline]:
    """Every baseline that the task allows: majority, TF-IDF plain and class-balanced, and with attributes the table's.
    From training rows of one class only the majority can be learned.

    Raises:
        ValueError: no classification, or no training rows.
    """
    if task.kind != "classification" or not task.train:
        raise ValueError(f"task {task.name!r}: baselines need labelled training rows; kind {task.kind!r}")
    if len({row["label"] for row in task.train}) < 2:
        return [majority(task)]
    found = [majority(task), tfidf(task), tfidf(task, balanced=True)]
    if "attributes" in task.train[0]:
        found += [table_logistic_regression(task), table_random_forest(task, seed)]
    return found


def majority(task: TaskData) -> Baseline:
    """The class frequencies of the training split for every item: predicts the most frequent class."""
    labels = task.labels or ()
    shares = np.bincount(_targets(task, task.train), minlength=len(labels)) / len(task.train)
    return Baseline("majority", np.tile(shares, (len(task.validation), 1)), np.tile(shares, (len(task.test), 1)), {})


def tfidf(task: TaskData, *, balanced: bool = False) -> Baseline:
    """Logistic regression on TF-IDF of word 1-2-grams and character 2-5-grams within words (log counts).

    Args:
        balanced: weigh classes by their inverse frequency: a better macro-F1 for worse probabilities.
    """
    vectorizer = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    train = vectorizer.fit_transform([row["text"] for row in task.train])
    validation, test = (vectorizer.transform([row["text"] for row in rows]) for rows in (task.validation, task.test))
    name = "tfidf_balanced" if balanced else "tfidf"
    return _logistic_regression(name, task, train, validation, test, "balanced" if balanced else None)


def table_logistic_regression(task: TaskData) -> Baseline:
    """The scorecard: logistic regression on `attributes`, one-hot or standardised. Needs no text."""
    features = make_pipeline(DictVectorizer(sparse=False), StandardScaler())
    return _logistic_regression("table_logistic_regression", task, *_table(task, features))


def table_random_forest(task: TaskData, seed: int = 0, n_trees: int = 500) -> Baseline:
    """A random forest on `attributes`, one-hot; its minimal leaf is chosen on the validation split."""
    train, validation, test = _table(task, DictVectorizer(sparse=False))

    def fit(min_leaf: int) -> Any:
        forest = RandomForestClassifier(n_trees, min_samples_leaf=min_leaf, random_state=seed)
        return forest.fit(train, _targets(task, task.train))

    model, chosen = _choose(task, fit, (1, 2, 5), validation)
    settings = {"n_trees": n_trees, "min_samples_leaf": chosen, "seed": seed}
    return Baseline(
        "table_random_forest", _probabilities(task, model, validation), _probabilities(task, model, test), settings
    )


def nearest_answers(train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Chat: for each test question, the answer to the most similar training question (cosine of TF-IDF).

    Compare by `metrics.rouge_l`. Ties go to the earlier training row.
    """
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    known = vectorizer.fit_transform([prompt_of(row) for row in train])
    asked = vectorizer.transform([prompt_of(row) for row in test])
    answers = [conversation(row)[-1]["content"] for row in train]
    return [answers[i] for i in _rows_argmax(asked, known)]


def _logistic_regression(
    name: str, task: TaskData, train: Any, validation: Any, test: Any, class_weight: str | None = None
) -> Baseline:
    def fit(strength: float) -> Any:
        model = LogisticRegression(C=strength, max_iter=1000, class_weight=class_weight)
        return model.fit(train, _targets(task, task.train))

    model, chosen = _choose(task, fit, C_GRID, validation)
    return Baseline(name, _probabilities(task, model, validation), _probabilities(task, model, test), {"C": chosen})


def _choose(task: TaskData, fit: Callable[[Any], Any], grid: Sequence[Any], validation: Any) -> tuple[Any, Any]:
    """The fitted model of least log loss on the validation split, and its setting; the earlier one of equals."""
    targets, classes = _targets(task, task.validation), range(len(task.labels or ()))
    models = [fit(setting) for setting in grid]
    losses = [log_loss(targets, _probabilities(task, model, validation), labels=classes) for model in models]
    best = int(np.argmin(losses))
    return models[best], grid[best]


def _probabilities(task: TaskData, model: Any, features: Any) -> Array:
    """[N, C], with 0 for classes that have no training row."""
    probabilities = np.zeros((features.shape[0], len(task.labels or ())))
    probabilities[:, model.classes_] = model.predict_proba(features)
    return probabilities


def _targets(task: TaskData, rows: Sequence[TaskRow]) -> Array:
    return class_indices([row["label"] for row in rows], task.labels or ())


def _table(task: TaskData, features: Any) -> tuple[Any, Any, Any]:
    """`attributes` as matrices: columns of numbers as they are, others one-hot."""
    columns = task.train[0]["attributes"]
    numeric = {c for c in columns if all(row["attributes"][c].replace(".", "", 1).isdigit() for row in task.train)}

    def read(rows: Sequence[TaskRow]) -> list[dict[str, Any]]:
        return [{c: float(v) if c in numeric else v for c, v in row["attributes"].items()} for row in rows]

    return features.fit_transform(read(task.train)), *map(features.transform, map(read, (task.validation, task.test)))


def _rows_argmax(asked: Any, known: Any, block: int = 256) -> list[int]:
    """For each row of a sparse matrix, the row of another with the largest product."""
    best: list[int] = []
    for start in range(0, asked.shape[0], block):
        best += np.argmax((asked[start : start + block] @ known.T).toarray(), axis=1).tolist()
    return best
