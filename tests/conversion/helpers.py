"""A tiny Llama whose attention and MLPs matter, and its calibration tokens."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    """Three layers of width 48 with norms unlike one; `fields` override the configuration.

    The norm's epsilon is small, because a token's length after the norm is the same for all tokens only without it.
    """
    config: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rms_norm_eps": 1e-9,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**config | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def calibration_ids() -> torch.Tensor:
    return torch.randint(0, 300, (12, 64), generator=torch.Generator().manual_seed(3))
