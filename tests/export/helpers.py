"""Checkpoints to export, and readers of the files that share no code with the package."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deepseek_v3 import DeepseekV3ForCausalLM
from tests.modeling_deepseek_v3.helpers import build, tiny_config

# No width is a multiple of 128, so that all of FP8's blocks at the edges are smaller.
RAGGED = {"hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 136, "kv_lora_rank": 136}
TOKENIZER = {"tokenizer.json": '{"model": "a stand-in"}\n', "tokenizer_config.json": '{"chat_template": "{{ x }}"}\n'}


def write_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, cls: type = DeepseekV3ForCausalLM, **overrides: Any
) -> Path:
    """A tiny model in the official layout, with files in the tokenizer's names."""
    model = build(tiny_config(**overrides), cls).to(dtype)
    model.save_pretrained(folder)
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, through the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                assert name not in found
                found[name] = opened.get_tensor(name)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file but the report, whose times differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "export.json"}


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
