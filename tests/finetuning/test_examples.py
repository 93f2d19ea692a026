"""What is learned from: the row that cannot be, and reasoning that the chat template drops."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from deepseek_v3.finetuning import load_task
from deepseek_v3.finetuning.examples import make_examples
from tests.finetuning.runs import recipe


@pytest.mark.parametrize("split, number", [("train", 3), ("validation", 6), ("test", 1)])
def test_a_conversation_that_cannot_be_learned_is_named(
    base: Path, data: Path, tokenizer: PreTrainedTokenizerBase, split: str, number: int
) -> None:
    """By its place in the split, though few of the validation rows are looked at."""
    task = load_task(data / "messages")
    rows = list(getattr(task, split))
    rows[number - 1] = {"messages": [{"role": "user", "content": "alone"}]}
    chosen = recipe(base, data / "messages", base, validation_rows=3)
    problem = rf"task .*messages: row {number} of {split}, .*: a conversation without an assistant's turn"
    with pytest.raises(ValueError, match=problem):
        make_examples(chosen, replace(task, **{split: rows}), tokenizer)


def test_reasoning_that_the_template_drops_is_counted(
    base: Path, data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = load_task(data / "messages")
    question = {"role": "user", "content": "late?"}
    answers: list[dict[str, str]] = [
        {"content": "<think>\nrent is late\n</think>\n\npaid"},
        {"content": "rent is late</think>paid"},
        {"content": "paid", "reasoning_content": "rent is late"},
        {"content": "<think></think>paid", "reasoning_content": ""},
        {"content": "paid"},
    ]
    rows = [{"messages": [question, {"role": "assistant", **answer}]} for answer in answers]
    task, chosen = replace(task, train=rows), recipe(base, data / "messages", base, max_length=100)
    note = "3 of 5 rows of train: their reasoning is not learned with this chat template"
    assert make_examples(chosen, task, tokenizer).notes == [note]
    keeping = copy.deepcopy(tokenizer)
    keeping.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert make_examples(chosen, task, keeping).notes == [note.replace("3 of", "1 of")]
    keeping.chat_template = None
    plain = [{"prompt": "late?", "completion": answer["content"]} for answer in answers]
    texts = dict.fromkeys(("train", "validation", "test"), plain)
    assert make_examples(chosen, replace(task, **texts), keeping).notes == []
