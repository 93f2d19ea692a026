"""One small checkpoint with everything beside it, and copies of it to damage."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.finetuning import apply_lora, load_adapter
from deepseek_v3.tokenization import train_tokenizer
from tests.modeling_deepseek_v3.helpers import build, tiny_config

VOCAB_SIZE = 600
TEXTS = ["The quick brown fox jumps over the lazy dog.", "def add(left, right):\n    return left + right\n"] * 20
Edit = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Model, tokenizer and generation configuration in one folder; loaded once, so that forks start warm."""
    folder = tmp_path_factory.mktemp("security") / "model"
    build(tiny_config(vocab_size=VOCAB_SIZE)).save_pretrained(folder)
    train_tokenizer(TEXTS, VOCAB_SIZE).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(checkpoint) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def adapter(checkpoint, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("security") / "adapter"
    model = apply_lora(DeepseekV3ForCausalLM.from_pretrained(checkpoint), ("attention", "experts"), rank=2)
    model.save_pretrained(folder)
    load_adapter(DeepseekV3ForCausalLM.from_pretrained(checkpoint), folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def adapter_folder(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forks inherit no threads, so torch must not wait for any."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def edit(file: Path, **values: object) -> Path:
    """Set keys of a JSON file and return the file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | values), encoding="utf-8")
    return file
