"""A model's results on a task, as the record holds them: figures with intervals from `metrics`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import IGNORE_INDEX
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..modeling_deepseek_v3.losses import linear_cross_entropy
from .baselines import nearest_answers
from .batches import (
    PAD_MULTIPLE,
    Encoded,
    Row,
    by_length,
    conversation,
    encode_classification,
    unlabelled_batches,
    without_reasoning,
)
from .build import unwrapped
from .examples import count_left_out, pieces_of
from .metrics import rouge_l, threshold_at_recall, weighted_mean
from .reports import bootstrap, class_indices, classification_report, text_report
from .tasks import TaskData

RECALL = 0.9  # at which a reviewer's share of the cases is reported
ANSWER_TOKENS = 128  # of an answer that ROUGE-L is measured on, at most


@torch.no_grad()
def class_probabilities(
    model: nn.Module, examples: Sequence[Mapping[str, Any]], n_classes: int, pad_id: int
) -> np.ndarray:
    """`[N, C]` float64, in the order of the examples of `encode_classification`."""
    model.eval()
    device = next(model.parameters()).device
    probabilities = np.empty((len(examples), n_classes))
    for chosen, batch in unlabelled_batches(examples, pad_id, device):
        probabilities[chosen] = model(**batch).logits.double().softmax(-1).cpu().numpy()
    return probabilities


@torch.no_grad()
def sums_of_nats(model: nn.Module, examples: Sequence[Encoded], pad_id: int) -> np.ndarray:
    """Per example the summed negative log-likelihood of its labels, nats `[N]`."""
    inner = unwrapped(model).eval()
    device = next(inner.parameters()).device
    nats = np.zeros(len(examples))
    for chosen in by_length([len(example.input_ids) for example in examples]):
        length = max(len(examples[i].input_ids) for i in chosen)
        length = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
        ids, labels = torch.full((len(chosen), length), pad_id), torch.full((len(chosen), length), IGNORE_INDEX)
        for row, i in enumerate(chosen):
            ids[row, : len(examples[i].input_ids)] = torch.tensor(examples[i].input_ids)
            labels[row, : len(examples[i].labels)] = torch.tensor(examples[i].labels)
        # padding stands behind everything that has a label, so causal attention needs no mask
        states = inner.model(input_ids=ids.to(device), use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:].to(device)
        predicted = targets != IGNORE_INDEX
        weights = torch.ones(int(predicted.sum()), device=device)
        _, each = linear_cross_entropy(states[predicted], inner.lm_head, targets[predicted], weights)
        rows = predicted.nonzero()[:, 0]
        sums = torch.zeros(len(chosen), dtype=torch.float64, device=device).index_add_(0, rows, each.double())
        nats[chosen] = sums.cpu().numpy()
    return nats


def classification_results(task: TaskData, validation: np.ndarray | None, test: np.ndarray) -> dict[str, Any]:
    """`classification_report` of probabilities `[N, C]` of the two splits, of a model or of a baseline.

    Of two classes it also tells what the threshold does that finds 90 % of the positive validation items, if any.
    """
    assert task.labels is not None
    labels = class_indices([row["label"] for row in task.test], task.labels)
    groups = _groups(task.test)
    report = classification_report(labels, test, task.labels, recall=RECALL, costs=task.costs, groups=groups)
    positive = class_indices([row["label"] for row in task.validation], task.labels) == 1
    if validation is not None and len(task.labels) == 2 and positive.any():
        threshold = threshold_at_recall(positive, validation[:, 1], RECALL)
        chosen = classification_report(labels, test, task.labels, threshold, groups=groups)
        names = ("threshold", "sensitivity", "specificity", "review_rate")
        report["at_validation_recall"] = {"recall": RECALL, **{name: chosen[name] for name in names}}
    return report


def _groups(rows: Sequence[Row]) -> list[str] | None:
    return [row["group"] for row in rows] if rows and "group" in rows[0] else None


def evaluate_task(
    model: nn.Module,
    task: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    generate: int = 0,
) -> dict[str, Any]:
    """Results on the test split.

    Classification: `classification_results`. Otherwise perplexity and bits per byte of what the model has to write
    (chat: the assistant's turns within `max_length`; text: all of it, in pieces of `max_length`), and ROUGE-L of its
    greedy answers to `generate` prompts, drawn by a fixed seed: of up to `ANSWER_TOKENS` or `max_length` tokens,
    without reasoning, against the whole answer of the data. Conversations whose prompt fills `max_length` are left
    out: `n` counts the others, `n_left_out` these.

    Rows that are longer than `max_length`, which lose their end (but for texts), are counted in `n_truncated`.

    Raises:
        ValueError: all are left out.
    """
    if task.labels is not None:
        classes, pad_id, validation = task.labels, tokenizer.pad_token_id, None
        if task.validation and len(classes) == 2:  # a threshold is to be chosen
            examples = encode_classification(task.validation, tokenizer, classes, max_length)
            validation = class_probabilities(model, examples, len(classes), pad_id)
        examples = encode_classification(task.test, tokenizer, classes, max_length)
        report = classification_results(task, validation, class_probabilities(model, examples, len(classes), pad_id))
        return {**report, "n_truncated": sum(row["truncated"] for row in examples)}
    of_all = pieces_of(task.test, "test", task, tokenizer, max_length)
    left_out = count_left_out(of_all, task, "test", max_length)
    measured = [row for row, of_row in zip(task.test, of_all, strict=True) if of_row]
    pieces = [of_row for of_row in of_all if of_row]
    row_of = np.repeat(np.arange(len(pieces)), [len(of_row) for of_row in pieces])
    each = sums_of_nats(model, [piece for of_row in pieces for piece in of_row], tokenizer.pad_token_id)
    nats = np.bincount(row_of, each, minlength=len(pieces))
    tokens = [[t for piece in of_row for t in piece.labels if t != IGNORE_INDEX] for of_row in pieces]
    sizes = np.array([len(tokenizer.decode(t, skip_special_tokens=True).encode()) for t in tokens])
    report = text_report(nats, np.array([len(t) for t in tokens]), sizes, _groups(measured))
    report |= {"n_left_out": left_out, "n_truncated": sum(any(piece.truncated for piece in row) for row in pieces)}
    if task.kind == "chat" and generate:
        rows = _drawn(task.test, generate)
        longest = min(ANSWER_TOKENS, max_length)
        report["rouge_l"] = _rouge(rows, _answers(model, rows, tokenizer, max_length, longest), longest)
    return report


def _drawn(rows: Sequence[Row], count: int) -> list[Row]:
    """Files are often sorted by source."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]


@torch.no_grad()
def _answers(
    model: nn.Module, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, tokens: int
) -> list[str]:
    """The model's greedy answers, of up to `tokens` tokens."""
    inner: DeepseekV3ForCausalLM = unwrapped(model).eval()
    answers = []
    for row in rows:
        if tokenizer.chat_template is None:
            prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(
                conversation(row)[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        prompt = prompt[:, -max_length:].to(inner.device)
        output = inner.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    return answers


def _rouge(rows: Sequence[Row], answers: Sequence[str], tokens: int) -> dict[str, float | None]:
    references = [conversation(row)[-1]["content"] for row in rows]
    scores = rouge_l(*(list(map(without_reasoning, texts)) for texts in (references, answers)))
    groups = _groups(rows)
    statistic = {"rouge_l": lambda weights: weighted_mean(scores, weights)}
    estimate = bootstrap(statistic, len(scores), groups=groups)["rouge_l"]
    figures = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    counts = {"n": len(scores)} if groups is None else {"n": len(scores), "n_groups": estimate.n}
    known = {name: None if math.isnan(value) else value for name, value in figures.items()}
    return {**known, **counts, "max_tokens": tokens}


def retrieval_results(
    task: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, generate: int
) -> dict[str, Any]:
    """What answering like the most similar training row reaches, on the prompts that `evaluate_task` draws, with
    answers cut to as many tokens."""
    rows, tokens = _drawn(task.test, generate), min(ANSWER_TOKENS, max_length)
    answers = []
    for answer in nearest_answers(task.train, rows):
        ids = tokenizer(without_reasoning(answer), add_special_tokens=False)["input_ids"]
        answers.append(tokenizer.decode(ids[:tokens], skip_special_tokens=True))
    return {"n": len(rows), "rouge_l": _rouge(rows, answers, tokens)}
