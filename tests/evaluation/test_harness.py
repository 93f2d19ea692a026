"""lm-evaluation-harness with our model plugged in, on a task whose data are local."""

import json
import math
from pathlib import Path

import pytest
import torch

from deepseek_v3.evaluation.harness import harness_results, name_in
from tests.evaluation.helpers import tiny_model, tiny_tokenizer

CHOICES = ["return x", "import y", "raise z", "del w"]


def write_task(folder: Path) -> Path:
    rows = [{"question": f"def f{i}(x):", "choices": CHOICES, "answer": i % 4} for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    path = folder / "local_choices.yaml"
    path.write_text(json.dumps(task))  # JSON is YAML
    return path


def test_a_local_task_scores_as_our_own_likelihoods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    results = harness_results(model, tokenizer, [str(write_task(tmp_path))], limit=8)["local_choices"]

    def nats(context: str, continuation: str) -> float:
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(tokenizer(f"{context}{continuation}", add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        return -sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids)))

    right = 0
    for i in range(8):
        scores = [nats(f"def f{i}(x):", f" {choice}") for choice in CHOICES]
        right += scores.index(min(scores)) == i % 4
    assert results["n"] == 8 and results["version"] == 1.0
    assert results["acc"]["value"] == right / 8
    error = math.sqrt(right / 8 * (1 - right / 8) / 7)
    assert results["acc"]["high"] - results["acc"]["value"] == pytest.approx(1.959964 * error, abs=1e-6)


def test_the_name_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    for content, name in {
        "task: mine\nprocess_docs: !function utils.process\n": "mine",
        "group: ours\ntask:\n  - mine\n  - task: other\n    metric_list: !function utils.x\n": "ours",
        "class: !function task.Mine\ntask: mine\n": "mine",
    }.items():
        file.write_text(content)
        assert name_in(file) == name
    for content, problem in {
        "- a\n": "found list, allowed is an object with a task or a group",
        "task: [a, b]\n": "found no name of a task or a group",
        "task: [a\n": "is not YAML",
    }.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=f"task.yaml: {problem}"):
            name_in(file)


def test_functions_and_groups_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = write_task(tmp_path)
    text = json.dumps(json.loads(task.read_text()), indent=2)
    task.write_text(text.replace('"{{question}}"', "!function utils.question"))
    (tmp_path / "utils.py").write_text("def question(doc):\n    return doc['question']\n")
    group = tmp_path / "group.yaml"
    group.write_text("group: ours\ntask:\n  - local_choices\n")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert harness_results(model, tokenizer, [str(task)], limit=4)["local_choices"]["n"] == 4
    assert "local_choices" in harness_results(model, tokenizer, [str(group)], limit=4)


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    with pytest.raises(ValueError, match="no task nowhere_at_all"):
        harness_results(tiny_model(), tiny_tokenizer(), ["nowhere_at_all"])


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        harness_results(tiny_model(), tiny_tokenizer(), ["arc_easy"])
