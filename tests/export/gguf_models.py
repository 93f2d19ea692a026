"""Tiny checkpoints with a tokenizer, whose rows fit the blocks of 32 that GGUF quantizes in."""

from pathlib import Path
from typing import Any

import torch

from deepseek_v3.export import export
from deepseek_v3.tokenization import DeepseekV3Tokenizer, train_tokenizer
from tests.modeling_deepseek_v3.helpers import build, tiny_config

TEXTS = ["The patient took 500 mg of aspirin.", "股票市场今天上涨了百分之三。", "def f(x):\n    return x + 1\n"] * 9
TOKENS, ROWS = 380, 400  # ids of the tokenizer, rows of the embedding
SIZES = {"vocab_size": ROWS, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 32, "num_hidden_layers": 3}


def make_tokenizer() -> DeepseekV3Tokenizer:
    return train_tokenizer(TEXTS, TOKENS)


def save_model(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A model of one dense, two MoE and one MTP layer, with weights of a trained one's size."""
    tokenizer = make_tokenizer()
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    build(tiny_config(**{**SIZES, **special, **config})).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_gguf(folder: Path, output: Path, quantization: str, **arguments: Any) -> Path:
    """The GGUF file of a checkpoint."""
    export(folder, output, "gguf", quantization=quantization, progress=False, **arguments)
    (file,) = output.glob("*.gguf")
    return file
