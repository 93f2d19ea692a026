"""Healing: a short continued training after a conversion, taught by the source, and the figure that judges it."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data import IGNORE_INDEX, Corpus, PackedDataset, bits_per_byte, iterate_batches, pack_documents
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..optimizer import MasterAdamW
from ..process import keep_freed_memory, stop_signals

LEARNING_RATE = 3e-5
WARMUP = 0.05  # of the steps; then linearly to zero
BETAS = (0.9, 0.99)
GRAD_CLIP = 1.0
ROWS_PER_CHUNK = 512  # of the `[rows, vocabulary]` fp32 tensors
LOG_EVERY = 5


def heal(
    model: DeepseekV3ForCausalLM,
    teacher: PreTrainedModel,
    dataset: PackedDataset,
    tokens: int,
    *,
    batch_size: int = 2,
    learning_rate: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the attention of `model` in place until its predictions are those of `teacher`: mean KL(teacher || model).

    Only the attention is trained: it alone is not exact after a conversion. The weights may be bf16, their masters are
    fp32. SIGINT and SIGTERM end the training after the step. Prints the loss every few steps.

    Args:
        tokens: rounded down to whole steps of `batch_size` rows, at least one.
        learning_rate: peak; default `LEARNING_RATE`.
        seed: of the order of the rows.

    Returns:
        `tokens`, `steps`, `cpu_seconds`, `seconds`, `learning_rate`, `interrupted`, and `loss` at each step, in nats.
    """
    peak = LEARNING_RATE if learning_rate is None else learning_rate
    per_step = batch_size * dataset.sequence_length
    steps = max(1, tokens // per_step)
    warmup = max(1, int(WARMUP * steps))
    parameters = attention_parameters(model)
    optimizer = MasterAdamW(parameters, lr=peak, betas=BETAS)
    keep_freed_memory()
    batches = iterate_batches(dataset, batch_size, seed=seed)
    began, cpu_began = time.monotonic(), time.process_time()
    losses: list[float] = []
    model.train()
    with stop_signals() as stop:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
            ids = next(batches)["input_ids"].to(model.device)
            with torch.no_grad():
                theirs = teacher.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            ours = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            losses.append(distill_(ours, model.lm_head, theirs, teacher.lm_head))
            nn.utils.clip_grad_norm_(parameters, GRAD_CLIP, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                mean = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
                print(f"healing: step {step + 1} of {steps}, KL {mean:.4f} nats per token", flush=True)
            if stop:
                break
    model.eval().requires_grad_(True)
    return {
        "tokens": len(losses) * per_step,
        "steps": len(losses),
        "cpu_seconds": round(time.process_time() - cpu_began),
        "seconds": round(time.monotonic() - began),
        "learning_rate": peak,
        "interrupted": bool(stop),
        "loss": [round(loss, 4) for loss in losses],
    }


def attention_parameters(model: DeepseekV3ForCausalLM) -> list[nn.Parameter]:
    """The parameters of all attention layers; every other one stops asking for a gradient."""
    model.requires_grad_(False)
    chosen = [p for layer in model.model.layers for p in layer.self_attn.parameters()]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def distill_(hidden: torch.Tensor, head: nn.Module, teacher_hidden: torch.Tensor, teacher_head: nn.Module) -> float:
    """Backpropagate the mean KL(teacher || student) of N tokens into `hidden [N, D]`; returns it, in nats.

    `teacher_hidden [N, D']`; the heads turn both into logits `[N, V]`, chunk by chunk: the logits of all tokens never
    exist together.
    """
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for rows, teacher_rows in zip(leaf.split(ROWS_PER_CHUNK), teacher_hidden.split(ROWS_PER_CHUNK), strict=True):
        with torch.no_grad():
            target = F.log_softmax(teacher_head(teacher_rows).float(), dim=-1)
        student = F.log_softmax(head(rows).float(), dim=-1)
        loss = F.kl_div(student, target, reduction="sum", log_target=True) / len(hidden)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


@dataclass(frozen=True)
class HeldoutText:
    """A held-out text as one token stream: `tokens` of it, `n_bytes` as UTF-8, packed into overlapping rows."""

    rows: PackedDataset
    tokens: int
    n_bytes: int

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Any, max_tokens: int, sequence_length: int) -> "HeldoutText":
        """The first `max_tokens` of the held-out documents joined by blank lines. A predicted token follows at least a
        quarter row of context, but in the first row."""
        text, enough = "", 16 * max_tokens  # characters: a token rarely has more
        for document in corpus.heldout:
            text += document.text[: enough - len(text)] + "\n\n"
            if len(text) >= enough:
                break
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"][:max_tokens], encoded["offset_mapping"]
        n_bytes = len(text[: offsets[len(ids) - 1][1]].encode())
        rows = pack_documents(
            [ids], sequence_length, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id, evaluation=True,
            context=sequence_length // 4,
        )  # fmt: skip
        return cls(rows, len(ids), n_bytes)


@torch.no_grad()
def heldout_bits_per_byte(model: PreTrainedModel, text: HeldoutText) -> float:
    """Bits per byte of `text` under any causal language model, the end of the text included."""
    nats = 0.0
    for row in range(len(text.rows)):
        batch = text.rows.rows([row])
        logits = model(batch["input_ids"].to(model.device), use_cache=False).logits[0, :-1].float()
        labels = batch["labels"][0, 1:].to(model.device)
        nats += float(F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
    return round(bits_per_byte(nats, text.n_bytes), 4)
