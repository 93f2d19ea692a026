"""Multi-token prediction (paper 2.2): module k predicts token i+k+1 from the state of position i and token i+k.

The modules follow the main layers as `model.layers.{N + k}`, which is their official place and name; embedding and
output head are the main model's own.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..configuration import DeepseekV3Config
from .layers import DeepseekV3Linear, DeepseekV3RMSNorm
from .losses import shift_left
from .model import DeepseekV3DecoderLayer


class DeepseekV3SharedHead(nn.Module):
    """The norm before the output head, which is the main model's (`shared_head.norm` on disk)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(_without(state_dict, f"{prefix}head.weight"), prefix, *args)


def _without(state_dict: dict[str, torch.Tensor], copy: str) -> dict[str, torch.Tensor]:
    """Checkpoints hold the main model's embedding and head once more in each MTP layer."""
    return {name: value for name, value in state_dict.items() if name != copy}


class DeepseekV3MTPLayer(DeepseekV3DecoderLayer):
    """One MTP module: `eh_proj([enorm(embedding); hnorm(state)])`, then a decoder layer (eq. 21-22)."""

    def __init__(self, config: DeepseekV3Config, depth: int) -> None:
        super().__init__(config, config.num_hidden_layers + depth)
        self.self_attn.layer_idx = depth  # its slot in the cache of the MTP layers
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = DeepseekV3Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = DeepseekV3SharedHead(config)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(_without(state_dict, f"{prefix}embed_tokens.weight"), prefix, *args)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`hidden_states`, `embeddings` `[B, S, H]`: the previous depth's states and the embeddings of the tokens one
        step further. Returns the state (for the next depth, and through `shared_head` for the output head), router
        logits and chosen experts."""
        joined = self.eh_proj(torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), dim=-1))
        return super().forward(
            joined,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )


def same_document(position_ids: torch.Tensor, steps: int) -> torch.Tensor:
    """`[B, S]` bool: position i and position i + `steps` exist and lie in the same packed document."""
    return shift_left(position_ids, steps, -1) == position_ids + steps
