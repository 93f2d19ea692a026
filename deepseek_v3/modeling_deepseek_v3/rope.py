"""Rotary position embedding with YaRN (paper 2.1.1, 4.3): for the decoupled key and the query's rope part only."""

import math

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from ..configuration import DeepseekV3Config
from .layers import Fp32Buffers


class DeepseekV3RotaryEmbedding(Fp32Buffers):
    """Cosines and sines of the rope dimensions for given positions."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        rope: dict = config.rope_parameters or {}
        self.rope_type = rope["rope_type"]
        init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DeepseekV3Config, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `theta^(-2i/d)` `[d/2]` without scaling, and the factor 1 for cosines and sines."""
        dim = config.qk_rope_head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        rope: dict = config.rope_parameters or {}
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids [B, S]` -> `(cos, sin)`, each `[B, S, d/2]` in `x`'s dtype (angles are computed in fp32)."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def softmax_scale(config: DeepseekV3Config) -> float:
    """`qk_head_dim^-0.5`, times YaRN's `mscale^2` when `mscale_all_dim` is set (DeepSeek's `inference/model.py`)."""
    rope: dict = config.rope_parameters or {}
    scale = config.qk_head_dim**-0.5
    mscale_all_dim = rope.get("mscale_all_dim", 0)
    if rope.get("rope_type", "default") != "default" and mscale_all_dim and rope["factor"] > 1:
        scale *= (0.1 * mscale_all_dim * math.log(rope["factor"]) + 1.0) ** 2
    return scale
