"""Healing: the loss against autograd on whole logits, what it trains, how it stops; and the figure it is judged by."""

import copy
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_v3.conversion import convert_llama, heal, healing, heldout_bits_per_byte
from deepseek_v3.data import PackedDataset, pack_documents
from tests.conversion.helpers import calibration_ids, tiny_llama


def rows(n_documents: int) -> PackedDataset:
    documents = np.random.default_rng(1).integers(3, 300, (n_documents, 64))
    return pack_documents(list(documents), 32, bos_id=0, eos_id=1)


def test_the_loss_and_its_gradient_are_those_of_kl_divergence_on_whole_logits() -> None:
    head, teacher_head = nn.Linear(12, 50), nn.Linear(9, 50)
    hidden, theirs = torch.randn(1100, 12, requires_grad=True), torch.randn(1100, 9)
    found = healing.distill_(hidden, head, theirs, teacher_head)

    exact = hidden.detach().double().requires_grad_()
    student, teacher = copy.deepcopy(head).double()(exact), copy.deepcopy(teacher_head).double()(theirs.double())
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healing_comes_closer_to_the_source_and_trains_the_attention_alone(dtype: torch.dtype) -> None:
    source = tiny_llama(initializer_range=0.1)
    model = convert_llama(source, calibration_ids(), n_shared=1, kv_lora_rank=4).to(dtype)
    before = copy.deepcopy(model.state_dict())
    record = heal(model, source.to(dtype), rows(3), 40 * 64, learning_rate=3e-3)
    assert record["steps"] == 40 and record["tokens"] == 40 * 64 and not record["interrupted"]
    assert sum(record["loss"][-3:]) < 0.6 * sum(record["loss"][:3])  # the same six rows
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_signal_ends_it_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama()
    model = convert_llama(source, calibration_ids(), n_shared=1)
    distill = healing.distill_

    def interrupted(*args: torch.Tensor) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return distill(*args)

    monkeypatch.setattr(healing, "distill_", interrupted)
    record = heal(model, source, rows(40), 40 * 64)
    assert record["steps"] == 1 and record["tokens"] == 64 and record["interrupted"]


def test_bits_per_byte_counts_every_token_once() -> None:
    source = tiny_llama()
    with torch.no_grad():
        source.lm_head.weight.zero_()  # every token has the same probability

    def tokenizer(text: str, **_: bool) -> dict[str, list]:
        ids = [3 + ord(letter) % 200 for letter in text]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}

    tokenizer.bos_token_id, tokenizer.eos_token_id = 0, 1
    corpus = SimpleNamespace(heldout=[SimpleNamespace(text="ä" * 70), SimpleNamespace(text="b" * 70)])
    text = healing.HeldoutText.of(corpus, tokenizer, 100, 32)
    assert text.tokens == 100 and text.n_bytes == 140 + 30  # 70 times two bytes, two line breaks, 28 letters
    assert heldout_bits_per_byte(source, text) == pytest.approx(101 * math.log2(300) / 170, abs=1e-3)
