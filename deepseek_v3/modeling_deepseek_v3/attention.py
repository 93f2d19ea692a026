"""Multi-head latent attention (paper 2.1.1).

The cache holds the compressed latent c^KV (after its norm) and the shared rotary key, each as one contiguous one-head
tensor, so that every cache class of transformers stores them as if they were keys and values. Attention over them is
computed in one of two ways that are equal in exact arithmetic:

* expanded: W^UK, W^UV turn the latents into per-head keys and values (eq. 1-5), then ordinary attention;
* absorbed: W^UK is applied to the query and W^UV to the output, and attention runs on the latents themselves.

Shape legend: B batch, S query length, T key length, H heads, n nope dim, r rope dim, v value dim, c latent rank.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..configuration import DeepseekV3Config
from .continuous_batching import PagedAttentionCache, update_paged_cache
from .layers import DeepseekV3Linear, DeepseekV3RMSNorm
from .rope import apply_rotary, softmax_scale


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, `softmax(q k^T * scaling + mask) v` in fp32: `[B, H, S, d] -> [B, S, H, v]`, and the weights."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def sdpa_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA; on CPU with the value padded to the key's width: only so torch has a fused kernel there."""
    value_dim = value.shape[-1]
    if value.device.type == "cpu" and value_dim < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - value_dim))
    output, _ = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    return output[..., :value_dim], None


ATTENTION_FUNCTIONS = AttentionInterface()
ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention


class DeepseekV3Attention(nn.Module):
    """Multi-head latent attention. `layer_idx` is the layer's slot in the cache."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # expanded keys and values have one head per query head
        self.q_lora_rank = config.q_lora_rank
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.attention_dropout = config.attention_dropout
        self.scaling = softmax_scale(config)
        self.is_causal = True

        hidden, bias = config.hidden_size, config.attention_bias
        if self.q_lora_rank is None:
            self.q_proj = DeepseekV3Linear(hidden, self.num_heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = DeepseekV3Linear(hidden, self.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekV3RMSNorm(self.q_lora_rank)
            self.q_b_proj = DeepseekV3Linear(self.q_lora_rank, self.num_heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = DeepseekV3Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekV3RMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = DeepseekV3Linear(self.num_heads * self.v_head_dim, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: PagedAttentionCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, S, hidden] -> [B, S, hidden]` and the attention weights where the implementation has them."""
        batch, length, _ = hidden_states.shape
        query_nope, query_rope = self._queries(hidden_states, position_embeddings)
        latent, key_rope = self._latents(hidden_states, position_embeddings)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
        elif isinstance(cache, PagedAttentionCache):
            latent, key_rope = update_paged_cache(cache, latent, key_rope, self.layer_idx, kwargs)

        attend = self._absorbed if self._absorbs(length, latent, attention_mask) else self._expanded
        output, weights = attend(query_nope, query_rope, latent, key_rope, attention_mask, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _queries(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 6-9: `[B, H, S, n]` and the rotated `[B, H, S, r]`."""
        batch, length, _ = hidden_states.shape
        if self.q_lora_rank is None:
            queries = self.q_proj(hidden_states)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        # -1: under tensor parallelism a rank holds only its share of the heads
        queries = queries.view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        query_nope, query_rope = queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return query_nope, apply_rotary(query_rope, *position_embeddings, self.config.rope_interleave)

    def _latents(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 1 and 3: the normed latent `[B, 1, S, c]` and the rotated shared key `[B, 1, S, r]`."""
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, key_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        key_rope = apply_rotary(key_rope.unsqueeze(1), *position_embeddings, self.config.rope_interleave)
        return self.kv_a_layernorm(latent).unsqueeze(1), key_rope

    def _absorbs(self, length: int, latent: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether the absorbed form is right here, and cheaper."""
        total = latent.shape[2]
        if total <= length or (self.training and self.attention_dropout):
            return False
        # A longer cache without a mask means "causal over an empty static cache" unless there is one query.
        # Masks other than a [B, 1, S, T] tensor (FlashAttention's 2-D, FlexAttention's block mask) stay with those.
        if attention_mask is None:
            usable_mask = length == 1
        else:
            usable_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4
        # Absorption reads the weight itself: an adapter, a quantized or offloaded layer has to be called instead.
        plain = type(self.kv_b_proj) is nn.Linear and self.kv_b_proj.weight.dtype == latent.dtype
        plain = plain and not (self.kv_b_proj._forward_pre_hooks or self.kv_b_proj._forward_hooks)
        plain = plain and not hasattr(self.kv_b_proj, "_hf_hook")
        return usable_mask and plain and self._absorbed_flops(length, total) < self._expanded_flops(length, total)

    def _expanded_flops(self, length: int, total: int) -> int:
        """Multiply-adds per head of the expanded form: expand the whole cache, then attend."""
        expand = total * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        return expand + length * total * (self.qk_head_dim + self.v_head_dim)

    def _absorbed_flops(self, length: int, total: int) -> int:
        """Multiply-adds per head of the absorbed form: project query and output, attend at the latent's width."""
        project = length * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        return project + length * total * (2 * self.kv_lora_rank + self.qk_rope_head_dim)

    def _expanded(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, _, total, _ = latent.shape
        expanded = self.kv_b_proj(latent.squeeze(1)).view(batch, total, -1, self.qk_nope_head_dim + self.v_head_dim)
        key_nope, value = expanded.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        attention = ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation.removeprefix("paged|"), eager_attention
        )
        dropout = self.attention_dropout if self.training else 0.0
        return attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _absorbed(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, length, _ = query_nope.shape
        weight = self.kv_b_proj.weight.view(heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        up_key, up_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)  # [H, n, c], [H, v, c]
        # All heads read the same latents: fold them into the query axis instead of copying the latents H times. The
        # large operand stands first and untransposed in each product: torch would copy a transposed bf16 one.
        query_latent = torch.matmul(query_nope, up_key).reshape(batch, heads * length, -1)
        query_rope = query_rope.reshape(batch, heads * length, -1)
        scores = torch.matmul(latent.squeeze(1), query_latent.transpose(1, 2))
        scores = scores + torch.matmul(key_rope.squeeze(1), query_rope.transpose(1, 2))
        scores = scores.transpose(1, 2)
        scores = scores.reshape(batch, heads, length, -1).float() * self.scaling
        if attention_mask is not None:
            total = scores.shape[-1]
            if attention_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attention_mask[..., :total], torch.finfo(scores.dtype).min)
            else:
                scores = scores + attention_mask[..., :total]
        weights = F.softmax(scores, dim=-1).to(latent.dtype)
        context = torch.matmul(weights.view(batch, heads * length, -1), latent.squeeze(1))
        context = context.view(batch, heads, length, -1).transpose(2, 3)
        return torch.matmul(up_value, context).permute(0, 3, 1, 2), weights
