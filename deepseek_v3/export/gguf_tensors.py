"""Which GGUF tensors of arch deepseek2 hold which official tensors, in both directions.

Three places differ from a renaming: `kv_b_proj` is split into its two halves, the keys' half transposed, as the
absorbed attention of llama.cpp wants them; the experts of a layer are one tensor per projection; MTP layers follow
the main layers under the name `nextn`, without their copies of embedding and head, for which llama.cpp takes the
model's own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..configuration import DeepseekV3Config
from ..modeling_deepseek_v3.checkpoint import tensor_shapes

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TOP = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}
# within a layer, after `model.layers.N.` and `blk.N.`
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}
KV_B = "self_attn.kv_b_proj.weight"
K_B, V_B = "attn_k_b.weight", "attn_v_b.weight"
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Place:
    """A GGUF tensor. `shape`: slowest dimension first, the reverse of the file's; `sources`: the official tensors that
    it holds, several being the experts along its first dimension."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of what one source gives."""
        return self.shape if len(self.sources) == 1 else self.shape[1:]


def official_shapes(config: DeepseekV3Config) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of a causal model with its MTP layers, in the model's order; a tied head is left out."""
    shapes = tensor_shapes(config, mtp=True)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def places(config: DeepseekV3Config) -> dict[str, Place]:
    """GGUF name -> tensor, in the order of `official_shapes`."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    found: dict[str, tuple[tuple[int, ...], list[str]]] = {}  # shape of a piece, and the pieces
    for official, shape in official_shapes(config).items():
        if official in TOP:
            found[TOP[official]] = shape, [official]
            continue
        _, _, layer, rest = official.split(".", 3)
        block = f"blk.{layer}."
        if rest == KV_B:
            halves = {K_B: (heads, config.kv_lora_rank, nope), V_B: (heads, config.v_head_dim, config.kv_lora_rank)}
            found |= {block + name: (half, [official]) for name, half in halves.items()}
        elif expert := EXPERT.fullmatch(rest):
            found.setdefault(f"{block}ffn_{expert[2]}_exps.weight", (shape, []))[1].append(official)
        else:
            found[block + LAYER[rest]] = shape, [official]
    return {
        name: Place(name, piece if len(sources) == 1 else (len(sources), *piece), tuple(sources))
        for name, (piece, sources) in found.items()
    }


def split_kv_b(weight: torch.Tensor, config: DeepseekV3Config) -> tuple[torch.Tensor, torch.Tensor]:
    """`kv_b_proj [heads * (nope + v), rank]` -> keys `[heads, rank, nope]`, values `[heads, v, rank]`."""
    per_head = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = per_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    return keys.transpose(1, 2), values


def join_kv_b(halves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The inverse of `split_kv_b`, of tensors by the last parts of their names."""
    return torch.cat((halves[K_B].transpose(1, 2), halves[V_B]), dim=1).flatten(0, 1)
