"""Rows to tensors: what has a label, how rows are packed, and that the model sees a packed example as one alone."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from deepseek_v3.data import IGNORE_INDEX
from deepseek_v3.finetuning.batches import (
    Encoded,
    cut,
    encode_chat,
    encode_classification,
    encode_text,
    pack,
    pad_classification,
    stack,
)
from deepseek_v3.finetuning.evaluate import sums_of_nats
from tests.finetuning.helpers import base as tiny_model
from tests.modeling_deepseek_v3.helpers import assert_same_gradients, gradients

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As templates that drop the reasoning of earlier turns: those read otherwise once another turn follows.
REWRITING = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else 'dropped')")


def say(*turns: str) -> list[dict[str, str]]:
    """ "s text", "u text", "a text" to messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.fixture(scope="module")
def chatml(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Another template, without generation blocks, and without BOS."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = CHATML
    return other


def learned(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the runs of labelled tokens; labels are the tokens themselves."""
    assert len(example.input_ids) == len(example.labels)
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


CHATS = {
    "one turn": (say("u Is it late?", "a yes, late"), ["yes, late"]),
    "system": (say("s Judge.", "u Is it late?", "a yes"), ["yes"]),
    "turns": (say("s S", "u a b", "a first  answer\n", "u d", "a second"), ["first  answer\n", "second"]),
    "user last": (say("u a", "a b", "u c"), ["b"]),
    "two answers": (say("u a", "a b", "a c"), ["b", "c"]),
    "greeting": (say("a hello", "u a", "a b"), ["b"]),
    "greeting on instruction": (say("s S", "a hello", "u a", "a b"), ["hello", "b"]),
    "unicode": (say("u 天气?", "a 很好 🙂"), ["很好 🙂"]),
}


@pytest.mark.parametrize("name", CHATS)
def test_our_template_labels_what_the_assistant_says(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    messages, answers = CHATS[name]
    example = encode_chat({"messages": messages}, tokenizer)
    assert learned(example, tokenizer) == [answer + EOS for answer in answers]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == text and text.count(BOS) == 1


@pytest.mark.parametrize("name", CHATS)
def test_a_template_without_generation_blocks_labels_the_same(chatml: PreTrainedTokenizerBase, name: str) -> None:
    messages, answers = CHATS[name]
    example = encode_chat({"messages": messages}, chatml)
    assert learned(example, chatml) == [f"{answer}<|im_end|>\n" for answer in answers]
    assert chatml.decode(example.input_ids) == chatml.apply_chat_template(messages, tokenize=False)
    assert example.input_ids == chatml.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("answer", ["\n\nYes", "\n\n\n\nYes", "\nYes"])
def test_tokens_that_would_merge_with_the_prompt(chatml: PreTrainedTokenizerBase, answer: str) -> None:
    """The prompt ends in a line break, and two of them are one token: the model is asked without the answer's."""
    merging = copy.deepcopy(chatml)
    merging.add_tokens(["\n\n"])
    messages = say("u a", f"a {answer}", "u b", "a c")
    whole = merging.apply_chat_template(messages)["input_ids"]
    example = encode_chat({"messages": messages}, merging)
    assert example.input_ids != whole and merging.decode(example.input_ids) == merging.decode(whole)
    assert learned(example, merging) == [f"{answer}<|im_end|>\n", "c<|im_end|>\n"]
    asked = merging.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    assert example.input_ids[:first] == asked


def test_both_ways_agree_on_one_template(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = copy.deepcopy(tokenizer)
    for tag in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert tag in plain.chat_template
        plain.chat_template = plain.chat_template.replace(tag, "")
    for messages, _ in CHATS.values():
        assert encode_chat({"messages": messages}, plain) == encode_chat({"messages": messages}, tokenizer)


def test_prompt_and_completion_are_a_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = encode_chat({"messages": say("u a b", "a c")}, tokenizer)
    assert encode_chat({"prompt": "a b", "completion": "c"}, tokenizer) == expected
    assert encode_chat({"prompt": say("u a b"), "completion": say("a c")}, tokenizer) == expected


def test_without_a_template_the_completion_follows_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    example = encode_chat({"prompt": "late or paid? ", "completion": "paid"}, plain)
    assert plain.decode(example.input_ids) == f"{BOS}late or paid? paid{EOS}"
    assert learned(example, plain) == [f"paid{EOS}"]
    for row in ({"messages": say("u a", "a b")}, {"prompt": say("u a"), "completion": say("a b")}):
        with pytest.raises(ValueError, match="no chat template"):
            encode_chat(row, plain)


def test_what_cannot_be_labelled_is_refused(
    tokenizer: PreTrainedTokenizerBase, chatml: PreTrainedTokenizerBase
) -> None:
    for turns in (("s a", "u b"), ("a a", "u b")):
        with pytest.raises(ValueError, match=r"without an assistant's turn after the first: roles \['\w+', 'user'\]"):
            encode_chat({"messages": say(*turns)}, tokenizer)
    rewriting = copy.deepcopy(chatml)
    rewriting.chat_template = REWRITING
    with pytest.raises(ValueError, match="changes turns once others follow"):
        encode_chat({"messages": say("u a", "a b", "u c", "a d")}, rewriting)
    assert learned(encode_chat({"messages": say("u a", "a b")}, rewriting), chatml) == ["b<|im_end|>\n"]
    opening = copy.deepcopy(chatml)
    opening.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    with pytest.raises(ValueError, match="prompt for an answer is not how it writes an answered turn .*turn 1"):
        encode_chat({"messages": say("u a", "a b")}, opening)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match="the chat template fails: .*Error: .*"):
        encode_chat({"messages": [*say("u a"), call]}, chatml)


def test_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    example = encode_text({"text": "late debt"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == f"{BOS}late debt{EOS}"
    assert learned(example, tokenizer) == [f"late debt{EOS}"]


def test_classification_is_cut_and_padded(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "debt late default loss", "label": "bad"}, {"text": "paid", "label": "good"}]
    short, long = (encode_classification(rows, tokenizer, ("bad", "good"), length) for length in (3, 100))
    assert [row["labels"] for row in long] == [0, 1]
    full = [tokenizer(row["text"])["input_ids"] for row in rows]
    assert [row["input_ids"] for row in long] == full
    assert [row["input_ids"] for row in short] == [ids[:3] for ids in full] and len(full[0]) > 3
    for length in map(len, full):
        cut_rows = encode_classification(rows, tokenizer, ("bad", "good"), length)
        assert [row["truncated"] for row in cut_rows] == [len(ids) > length for ids in full]
    batch = pad_classification(long, tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    for row, ids in enumerate(full):
        assert batch["input_ids"][row].tolist() == ids + [tokenizer.pad_token_id] * (8 - len(ids))
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (8 - len(ids))
    assert batch["labels"].tolist() == [0, 1] and {value.dtype for value in batch.values()} == {torch.int64}


# --- packing


def numbered(lengths: list[int], first_label: int = 1) -> list[Encoded]:
    """Examples of tokens that occur once; labels from `first_label` on."""
    examples, start = [], 1
    for length in lengths:
        ids = list(range(start, start + length))
        examples.append(Encoded(ids, [IGNORE_INDEX] * min(first_label, length) + ids[first_label:]))
        start += length
    return examples


def pack_all(examples: list[Encoded], length: int, pad_id: int, split: bool) -> list[dict[str, torch.Tensor]]:
    return pack([piece for example in examples for piece in cut(example, length, split)], length, pad_id)


def labels_of(rows: list[dict[str, torch.Tensor]]) -> list[int]:
    return sorted(label for row in rows for label in row["labels"].tolist() if label != IGNORE_INDEX)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 20), st.booleans())
def test_every_labelled_token_is_packed_once(lengths: list[int], length: int, split: bool) -> None:
    examples = numbered(lengths)
    rows = pack_all(examples, length, 0, split)
    kept = [label for example in examples for label in (example.labels if split else example.labels[:length])]
    assert labels_of(rows) == sorted(label for label in kept if label != IGNORE_INDEX)
    for row in rows:
        assert {name: (value.shape, value.dtype) for name, value in row.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), ((length,), torch.int64)
        )
        ids, labels, positions = (row[name] for name in ("input_ids", "labels", "position_ids"))
        starts = positions == 0
        assert starts[0] and (positions[1:][~starts[1:]] == positions[:-1][~starts[1:]] + 1).all()
        assert (labels[starts] == IGNORE_INDEX).all() and (labels[ids == 0] == IGNORE_INDEX).all()
        inside = (labels != IGNORE_INDEX).nonzero()[:, 0]
        assert (ids[inside] == labels[inside]).all()
        assert (ids[inside - 1] == labels[inside] - 1).all()  # its predecessor in the example is the one in the row


def test_rows_are_as_full_as_they_get() -> None:
    assert len(pack_all(numbered([6, 4, 5, 5, 9, 1 + 1]), 10, 0, split=False)) == 4
    rows = pack_all(numbered([7, 2, 8, 3]), 10, 0, split=False)
    assert len(rows) == 2 and not any((row["input_ids"] == 0).any() for row in rows)


def test_conversations_are_cut_off_and_documents_go_on() -> None:
    (example,) = numbered([12])
    (piece,) = cut(example, 5, split=False)
    assert piece == Encoded([1, 2, 3, 4, 5], [IGNORE_INDEX, 2, 3, 4, 5], truncated=True)
    assert [piece.truncated for length in (11, 12) for piece in cut(example, length, split=False)] == [True, False]
    pieces = cut(example, 5, split=True)
    assert [piece.input_ids for piece in pieces] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 11, 12]]
    assert all(piece.labels == [IGNORE_INDEX, *piece.input_ids[1:]] for piece in pieces)
    assert not any(piece.truncated for piece in pieces)
    (question,) = numbered([12], first_label=8)
    assert cut(question, 8, split=False) == [] and pack_all([question], 8, 0, split=False) == []


@pytest.fixture(scope="module")
def examples() -> list[Encoded]:
    """Of unequal lengths, with prompts; 97 tokens are in the model's vocabulary."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length, prompt in ((3, 1), (7, 4), (12, 2), (9, 1), (5, 3), (4, 2), (10, 6), (2, 1)):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
def test_a_packed_example_gets_the_logits_that_it_gets_alone(examples: list[Encoded], attention: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    rows = pack_all(examples, 16, 0, split=False)
    assert len(rows) < len(examples)
    with torch.no_grad():
        packed = model(**{name: value for name, value in stack(rows).items() if name != "labels"}).logits
        for example in examples:
            ids = torch.tensor(example.input_ids)
            (place,) = [
                (row, start)
                for row, content in enumerate(rows)
                for start in (content["position_ids"] == 0).nonzero()[:, 0].tolist()
                if torch.equal(content["input_ids"][start : start + len(ids)], ids)
            ]
            alone = model(ids[None]).logits[0]
            found = packed[place[0], place[1] : place[1] + len(ids)]
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_losses_and_gradients_of_packed_rows_are_the_sums_of_the_examples(examples: list[Encoded]) -> None:
    """With the MTP loss, which looks one token further ahead."""
    model = tiny_model(mtp=1, mtp_loss_coef=0.3, seq_balance_coef=0.0).train()

    def total(batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        sums = {"loss": 0.0, "ce_loss": 0.0, "mtp_loss": 0.0}
        for batch in batches:
            output = model(**batch, num_items_in_batch=100)
            output.loss.backward()
            sums = {name: value + output[name].item() for name, value in sums.items()}
        return sums, gradients(model)

    rows = stack(pack_all(examples, 16, 0, split=False))
    alone: list[dict[str, Any]] = [
        {"input_ids": torch.tensor([e.input_ids]), "labels": torch.tensor([e.labels])} for e in examples
    ]
    found, expected = total([rows]), total(alone)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and expected[0]["mtp_loss"] > 1
    assert_same_gradients(found[1], expected[1], 1e-4)


def test_sums_of_nats_are_those_of_plain_log_softmax(examples: list[Encoded]) -> None:
    model = tiny_model()
    found = sums_of_nats(model, examples, 0)
    for nats, example in zip(found, examples, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        wanted = [(i, label) for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
        assert nats == pytest.approx(-sum(float(scores[i - 1, label]) for i, label in wanted), rel=1e-5)
