"""Results on a test split: what is left out, and groups in the intervals of generated answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.finetuning import TaskData, load_task
from deepseek_v3.finetuning import evaluate as module
from deepseek_v3.finetuning.evaluate import evaluate_task, retrieval_results
from deepseek_v3.finetuning.metrics import rouge_l
from deepseek_v3.finetuning.tasks.task_data import build_task


@pytest.fixture(scope="module")
def model(base: Path) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(base)


def grouped(task: TaskData, groups: int) -> TaskData:
    rows = [{**row, "group": f"g{i % groups}"} for i, row in enumerate(task.test)]
    return replace(task, test=rows)


def test_the_interval_of_rouge_resamples_groups(
    data: Path, model: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the answers are right, by group: of two groups nobody knows more than 0 to 1."""
    task = load_task(data / "messages")
    answers = [row["messages"][-1]["content"] if i % 2 else "" for i, row in enumerate(task.test)]
    monkeypatch.setattr(module, "_answers", lambda *_: answers)
    plain = evaluate_task(model, task, tokenizer, 48, generate=8)["rouge_l"]
    assert (plain["value"], plain["n"]) == (0.5, 8) and "n_groups" not in plain
    assert plain["low"] > 0 and plain["high"] < 1
    found = evaluate_task(model, grouped(task, 2), tokenizer, 48, generate=8)["rouge_l"]
    assert (found["value"], found["n"], found["n_groups"]) == (0.5, 8, 2)
    assert (found["low"], found["high"]) == (0.0, 1.0)
    by_retrieval = retrieval_results(grouped(task, 2), tokenizer, 48, 8)
    assert by_retrieval["n"] == 8 and by_retrieval["rouge_l"]["n_groups"] == 2


def test_conversations_whose_prompt_fills_the_length_are_counted(
    data: Path, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = load_task(data / "messages")
    expected = evaluate_task(model, grouped(task, 3), tokenizer, 48)
    assert (expected["n"], expected["n_left_out"], expected["n_truncated"]) == (8, 0, 0)
    long = {"messages": [{"role": "user", "content": "late " * 60}, {"role": "assistant", "content": "no"}]}
    mixed = replace(task, test=[{**long, "group": "h"}, *grouped(task, 3).test])
    assert evaluate_task(model, mixed, tokenizer, 48) == {**expected, "n_left_out": 1}
    cut = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "late " * 60}]}
    report = evaluate_task(model, replace(task, test=[cut, *task.test]), tokenizer, 48)
    assert (report["n"], report["n_left_out"], report["n_truncated"]) == (9, 0, 1)
    with pytest.raises(ValueError, match="none of the 2 rows of test .* max_length 48"):
        evaluate_task(model, replace(task, test=[long, long]), tokenizer, 48)


@pytest.mark.parametrize("max_length, tokens", [(512, 128), (48, 48)])
def test_the_nearest_answer_is_as_long_as_the_models_may_be(
    tokenizer: PreTrainedTokenizerBase, max_length: int, tokens: int
) -> None:
    """Five hundred words score as the tokens that are left of them; the reference keeps all of its words."""
    question = {"role": "user", "content": "debt?"}
    answer = " ".join(["late rent"] * 250)
    rows = [{"messages": [question, {"role": "assistant", "content": answer}]}]
    task = build_task("t", "chat", {"train": rows, "validation": [], "test": rows}, source="s", licence=None)
    found = retrieval_results(task, tokenizer, max_length, 1)["rouge_l"]
    cut = tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"][:tokens])
    assert len(cut.split()) < 250
    assert found["value"] == pytest.approx(rouge_l([answer], [cut])[0]) and found["max_tokens"] == tokens


def test_reasoning_has_no_part_in_rouge(
    model: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(content: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "debt?"}, {"role": "assistant", "content": content}]}

    rows = [row(f"<think>{'rent ' * 200}</think>late debt"), row("late debt")]
    task = build_task("t", "chat", {"train": rows, "validation": [], "test": rows}, source="s", licence=None)
    assert retrieval_results(task, tokenizer, 48, 2)["rouge_l"]["value"] == 1
    monkeypatch.setattr(module, "_answers", lambda *_: ["late debt", "<think>rent</think>late debt"])
    assert evaluate_task(model, task, tokenizer, 48, generate=2)["rouge_l"]["value"] == 1
