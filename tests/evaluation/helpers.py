"""A small checkpoint with a tokenizer, and a text that it was not trained on."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from deepseek_v3.tokenization import train_tokenizer
from tests.modeling_deepseek_v3.helpers import build, tiny_config

VOCABULARY = 300
LINES = [f"def f{i}(x):\n    return x + {i * i % 97}  # line {i}, ünïcode ∑\n" for i in range(300)]


def tiny_model(**overrides: Any) -> DeepseekV3ForCausalLM:
    return build(tiny_config(**{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **overrides}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(LINES, VOCABULARY)


def write_text(folder: Path, documents: int = 75) -> str:
    """A folder of text files; the path as a source."""
    folder.mkdir()
    size = len(LINES) // documents
    for i in range(documents):
        (folder / f"{i:02}.txt").write_text("".join(LINES[i * size : (i + 1) * size]))
    return str(folder)


def write_checkpoint(folder: Path, **overrides: Any) -> DeepseekV3Config:
    model = tiny_model(**overrides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.config
