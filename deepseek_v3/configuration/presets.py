"""Named models: two to train here, and two published ones whose weights fit these shapes exactly."""

import copy
from dataclasses import fields
from typing import Any

from .configuration_deepseek_v3 import DeepseekV3Config
from .validation import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    # Unit tests: under a million parameters, with every mechanism of V3 present.
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 512,
    },
    # Pretraining in minutes on a CPU. A token's experts are as wide together as the dense layer, and the gates are
    # scaled by sqrt(num_experts_per_tok), which keeps the routed sum at the size of one expert's output.
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 640,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.0,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 1024,
    },
    # moonshotai/Moonlight-16B-A3B (arXiv 2502.16982).
    "moonlight-16b-a3b": {
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "rms_norm_eps": 1e-5,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
    },
    # deepseek-ai/DeepSeek-V3: the class defaults, extended to 160k tokens by YaRN (section 4.3).
    "deepseek-v3-671b": {
        "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": 10000,
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
}


def preset(name: str, **overrides: Any) -> DeepseekV3Config:
    """Build a named configuration, with some fields changed.

    Example:
        >>> preset("tiny", num_hidden_layers=2).num_hidden_layers
        2

    Raises:
        ValueError: unknown `name` (the message lists all), a name in `overrides` that is no field of the
            configuration, or values that do not fit together.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: found {name!r}, allowed " + ", ".join(map(repr, PRESETS)))
    known = {field.name for field in fields(DeepseekV3Config)} | set(DeepseekV3Config.attribute_map)
    known |= {"num_labels", "attn_implementation", "experts_implementation"}
    if unknown := sorted(set(overrides) - known):
        raise ConfigError(f"preset({name!r}): found unknown fields {unknown}, allowed the fields of DeepseekV3Config")
    return DeepseekV3Config(**{**copy.deepcopy(PRESETS[name]), **overrides})
