"""Tiny fine-tuning runs: a base with its tokenizer, data files of every kind, recipes, a signal at a step."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepseek_v3.finetuning import FinetuneRecipe
from deepseek_v3.finetuning.trainer import FinetuneTrainer
from deepseek_v3.tokenization import DeepseekV3Tokenizer, train_tokenizer
from tests.modeling_deepseek_v3.helpers import build, tiny_config

VOCABULARY = 400
WORDS = ("debt", "late", "default", "loss", "paid", "profit", "steady", "growth", "rent", "city", "house", "car")
CLASSES = ("bad", "fair", "good")
SPLITS = {"train": 16, "validation": 6, "test": 8}
# What a base has of its own and a fine-tuned model has to keep.
COEFFICIENTS = {"mtp_loss_coef": 0.2, "seq_balance_coef": 0.003}


def make_tokenizer() -> DeepseekV3Tokenizer:
    return train_tokenizer([" ".join(WORDS), "Is it good? Yes, it is. No."] * 5, VOCABULARY)


def save_base(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A tiny model of one dense and two MoE layers and one MTP layer, with weights of a trained one's size."""
    tokenizer = make_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "num_nextn_predict_layers": 1}
    model = build(tiny_config(**{**sizes, **special, **COEFFICIENTS, **config})).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _texts(count: int, seed: int, longest: int = 9) -> list[tuple[str, int]]:
    """(text, class): the words of a class are among its first eight words, four to a class and two of them shared."""
    numbers = np.random.default_rng(seed)
    found = []
    for i in range(count):
        kind = i % 3
        own = WORDS[3 * kind : 3 * kind + 4]
        words = [str(numbers.choice(own if j % 2 else WORDS)) for j in range(int(numbers.integers(3, longest)))]
        found.append((" ".join(words), kind))
    return found


def write_data(folder: Path, kind: str, sizes: dict[str, int] = SPLITS) -> Path:
    """`kind`: two or three (classes), messages, completion, text. One .jsonl per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(sizes.items()):
        rows: list[dict[str, Any]] = []
        for text, label in _texts(count, seed):
            answer = f"it is {CLASSES[label]}, {text.split()[0]}"
            question = {"role": "user", "content": f"{text}?"}
            reply = {"role": "assistant", "content": answer}
            rows.append(
                {
                    "two": {"text": text, "label": "event" if label == 0 else "none"},
                    "three": {"text": text, "label": CLASSES[label]},
                    "messages": {"messages": [{"role": "system", "content": "Judge."}, question, reply]},
                    "completion": {"prompt": f"{text}?", "completion": answer},
                    "text": {"text": f"{text}. {answer}."},
                }[kind]
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(base: Path, data: Path, output: Path, /, **changes: Any) -> FinetuneRecipe:
    """Four steps of eight rows, two to the epoch."""
    values: dict[str, Any] = {
        "base": str(base),
        "task": str(data),
        "output_dir": str(output),
        "rank": 4,
        "learning_rate": 0.01,
        "batch_size": 8,
        "epochs": 2,
        "max_length": 48,
        "compare": False,
        "merge": False,
    }
    return FinetuneRecipe(**{**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter or a model."""
    name = "adapter_model.safetensors" if folder.name == "adapter" else "model.safetensors"
    return load_file(folder / name)


def assert_same_weights(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def signal_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while optimizer step `steps` is computed."""
    clip = FinetuneTrainer._clip_grad_norm

    def patched(self: FinetuneTrainer, model: torch.nn.Module) -> Any:
        if self.state.global_step + 1 == steps:
            os.kill(os.getpid(), number)
        return clip(self, model)

    monkeypatch.setattr(FinetuneTrainer, "_clip_grad_norm", patched)
