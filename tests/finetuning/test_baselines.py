"""The baselines on small made-up tasks whose best result is known, and against pipelines written out by hand."""

import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline, make_union

from deepseek_v3.finetuning import baselines
from deepseek_v3.finetuning.evaluate import classification_results, retrieval_results
from deepseek_v3.finetuning.metrics import accuracy, macro_f1, roc_auc
from deepseek_v3.finetuning.reports import class_indices
from deepseek_v3.finetuning.tasks.task_data import build_task

WORDS = {"bad": ("loss", "fell"), "neutral": ("board", "office"), "good": ("profit", "rose")}


def sentiment(n=120, noise=0.0, labels=("bad", "neutral", "good")):
    rng = random.Random(0)

    def rows(count):
        found = []
        for i in range(count):
            label = labels[0] if i % 2 else labels[i // 2 % (len(labels) - 1) + 1]  # the first class: half of the rows
            word = rng.choice(WORDS[rng.choice(labels) if rng.random() < noise else label])
            found.append({"text": f"{rng.randrange(10**6)} {word} {rng.choice('abc')}", "label": label})
        return found

    splits = {"train": rows(n), "validation": rows(40), "test": rows(60)}
    return build_task("x", "classification", splits, labels=labels, licence=None, source="made up")


def credit(n=300):
    """Bad where the purpose is a car or the amount is over 500, but not both: no linear rule."""
    rng = random.Random(0)

    def rows(count):
        found = []
        for _ in range(count):
            purpose, amount = rng.choice(["car", "house", "boat"]), rng.randrange(1000)
            label = "bad" if (purpose == "car") != (amount > 500) else "good"
            attributes = {"purpose": purpose, "amount": str(amount), "rate": f"{rng.randrange(4)}.5"}
            found.append({"text": f"{amount} for a {purpose}", "label": label, "attributes": attributes})
        return found

    splits = {"train": rows(n), "validation": rows(100), "test": [*rows(99), *rows(1)]}
    for row in splits["test"][:3]:
        row["attributes"]["purpose"] = "unheard of"
    return build_task("x", "classification", splits, labels=("good", "bad"), licence=None, source="made up")


def targets(task, rows):
    return class_indices([row["label"] for row in rows], task.labels)


def test_majority_is_the_frequencies_of_training():
    task = sentiment()
    found = baselines.majority(task)
    np.testing.assert_allclose(found.test, np.tile([1 / 2, 1 / 4, 1 / 4], (60, 1)))
    assert found.validation.shape == (40, 3)
    assert accuracy(targets(task, task.test), found.test.argmax(1)) == 0.5


def test_tfidf_solves_a_task_of_words_and_gives_probabilities_in_label_order():
    task = sentiment()
    found = baselines.tfidf(task)
    assert accuracy(targets(task, task.test), found.test.argmax(1)) == 1.0
    np.testing.assert_allclose(found.test.sum(1), 1)


def test_tfidf_is_the_pipeline_with_the_best_c_of_validation():
    task = sentiment(noise=0.3)
    texts = {split: [row["text"] for row in getattr(task, split)] for split in ("train", "validation", "test")}
    best = None
    for strength in baselines.C_GRID:
        features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
        )
        model = make_pipeline(features, LogisticRegression(C=strength, max_iter=1000))
        model.fit(texts["train"], targets(task, task.train))
        loss = log_loss(targets(task, task.validation), model.predict_proba(texts["validation"]), labels=[0, 1, 2])
        if best is None or loss < best[0]:
            best = loss, strength, model.predict_proba(texts["test"])
    found = baselines.tfidf(task)
    assert found.settings == {"C": best[1]} and best[1] not in (baselines.C_GRID[0], baselines.C_GRID[-1])
    np.testing.assert_allclose(found.test, best[2], atol=1e-9)


def test_balanced_classes_raise_the_recall_of_the_rare_ones():
    task = sentiment(600, noise=0.8)  # the word of a rare class: .12 against .13 for the frequent one
    labels = targets(task, task.test)
    plain, balanced = baselines.tfidf(task).test.argmax(1), baselines.tfidf(task, balanced=True).test.argmax(1)
    assert (balanced != 0).sum() > (plain != 0).sum() and macro_f1(labels, balanced, 3) > macro_f1(labels, plain, 3)


def test_a_class_without_training_rows_has_probability_zero():
    task = sentiment()
    splits = {split: list(getattr(task, split)) for split in ("train", "validation", "test")}
    splits["train"] = [row for row in splits["train"] if row["label"] != "neutral"]
    less = build_task("x", "classification", splits, labels=task.labels, licence=None, source="made up")
    for found in (baselines.majority(less), baselines.tfidf(less)):
        assert found.test.shape == (60, 3) and not found.test[:, 1].any()
        np.testing.assert_allclose(found.test.sum(1), 1)


@pytest.mark.parametrize("make", [sentiment, credit])
def test_a_training_split_of_one_class_leaves_the_majority(make):
    task = make()
    one = [row for row in task.train if row["label"] == task.labels[0]]
    (found,) = baselines.classification_baselines(replace(task, train=one))
    assert found.name == "majority" and (found.test[:, 0] == 1).all()
    share = np.mean([row["label"] == task.labels[0] for row in task.test])
    assert classification_results(task, found.validation, found.test)["accuracy"]["value"] == share


def test_table_baselines_read_numbers_and_categories():
    task = credit()
    positive = targets(task, task.test) == 1
    linear = baselines.table_logistic_regression(task)
    forest = baselines.table_random_forest(task, n_trees=50)
    assert 0.55 < roc_auc(positive, linear.test[:, 1]) < 0.85 < 0.97 < roc_auc(positive, forest.test[:, 1])
    assert np.isfinite(linear.test).all() and forest.settings["min_samples_leaf"] in (1, 2, 5)
    again = baselines.table_random_forest(task, n_trees=50)
    np.testing.assert_array_equal(forest.test, again.test)
    train, _, _ = baselines._table(task, baselines.DictVectorizer(sparse=False))
    assert train.shape == (300, 5)  # three purposes, two numbers


def test_classification_baselines_are_those_the_task_allows(monkeypatch):
    monkeypatch.setattr(baselines, "C_GRID", (1.0,))
    names = [found.name for found in baselines.classification_baselines(sentiment())]
    assert names == ["majority", "tfidf", "tfidf_balanced"]
    monkeypatch.setattr(baselines, "table_random_forest", lambda task, seed: ("forest", seed))
    found = baselines.classification_baselines(credit(), seed=3)
    assert found[3].name == "table_logistic_regression" and found[4] == ("forest", 3)
    splits = {"train": [], "validation": [], "test": [{"text": "x", "label": "a"}]}
    empty = build_task("quiz", "classification", splits, labels=("a", "b"), licence=None, source="made up")
    with pytest.raises(ValueError, match="task 'quiz': baselines need labelled training rows"):
        baselines.classification_baselines(empty)


def test_nearest_answers_follow_the_question():
    def turn(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    train = [turn("What is gout ?", "A joint disease."), turn("How is asthma treated ?", "By inhalers.")]
    train.append(turn("痛风是什么", "病"))
    test = [turn("How is childhood asthma treated ?", ""), turn("What is pseudo-gout ?", ""), turn("什么是痛风", "")]
    assert baselines.nearest_answers(train, test * 200) == ["By inhalers.", "A joint disease.", "病"] * 200
    prompts = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in train]
    assert baselines.nearest_answers(prompts, [{"prompt": "asthma"}]) == ["By inhalers."]


def test_retrieval_is_measured_on_drawn_prompts(tokenizer):
    """Test questions stand in train word for word but one, whose answer then is another's."""
    numbers = ("seven", "ninety", "twelve", "forty")
    rows = [{"prompt": f"What is number {word}?", "completion": f"It is the {word}."} for word in numbers]
    turns = [{"role": "user", "content": "Unheard of"}, {"role": "assistant", "content": "Quite so"}]
    test = [*rows[:3], {"messages": turns}]
    task = build_task("t", "chat", {"train": rows, "validation": [], "test": test}, source="s", licence=None)
    results = retrieval_results(task, tokenizer, 48, 10)
    assert results["n"] == results["rouge_l"]["n"] == 4
    assert results["rouge_l"]["value"] == pytest.approx(3 / 4)
