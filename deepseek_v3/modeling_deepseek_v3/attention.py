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
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from ..configuration import DeepseekV3Config
from ..kernels import short_attention
from ..kernels.dispatch import uses_triton
from ..kernels.mla_attention import mla_attention
from ..kernels.mla_decode import fits, mla_decode
from ..kernels.rope import rotate_queries_and_key_
from .continuous_batching import PagedAttentionCache, update_paged_cache
from .layers import DeepseekV3Linear, DeepseekV3RMSNorm, plain_weight
from .rope import softmax_scale


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
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA. On CPUs the value is padded to the key's width, for only so torch has a fused kernel there,
    and short sequences have a backward of their own, `kernels.short_attention`."""
    is_causal = kwargs.get("is_causal")
    causal = module.is_causal if is_causal is None else is_causal
    if causal and scaling is not None and not dropout and short_attention.takes(query, key, value, attention_mask):
        output = short_attention.short_attention(query, key, value, scaling, attention_mask)
        return output.transpose(1, 2).contiguous(), None
    value_dim = value.shape[-1]
    if value.device.type == "cpu" and value_dim < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - value_dim))
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output[..., :value_dim], None


ATTENTION_FUNCTIONS = AttentionInterface()
ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention


def with_expanded_key(
    module: nn.Module,
    queries: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    *args,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention functions, which want heads first and every head to have its copy of the rotary key.

    SDPA takes the place of one that shares the rotary key.

    `queries [B, S, H, n + r]`, `key_nope [B, T, H, n]`, `key_rope [B, 1, T, r]`, `value [B, T, H, v]`.
    """
    key_nope = key_nope.transpose(1, 2)
    key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
    implementation = module.config._attn_implementation.removeprefix("paged|")
    implementation = "sdpa" if implementation in SHARED_KEY_FUNCTIONS else implementation
    attend = ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    return attend(module, queries.transpose(1, 2), key, value.transpose(1, 2), *args, **kwargs)


def shared_key_attention(
    module: nn.Module,
    queries: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention implementation `"deepseek_v3"`: `kernels.mla_attention`, which never copies the rotary key.

    `attention_mask`: None (causal), the first visible key of each query `[B, S]` int32, or a mask `[B, 1, S, S]`, bool
    or added to the scores, that leaves each query one unbroken run of keys up to its own. Under autocast all is
    computed in autocast's dtype.
    """
    if dropout:
        raise ValueError(f"attention_dropout: found {dropout}, allowed 0 with attn_implementation='deepseek_v3'")
    length, total = queries.shape[1], key_nope.shape[1]
    if attention_mask is None and length > 1:
        total = length  # what is longer is an empty static cache
    elif attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = visible_keys(attention_mask[..., :total])
    if attention_mask is not None:
        attention_mask = attention_mask.expand(queries.shape[0], -1)
    dtype = _dtype_of_products(queries)
    keys = (key_nope[:, :total], key_rope[:, 0, :total], value[:, :total])
    query, key_nope, key_rope, value = (x.to(dtype) for x in (queries, *keys))
    with maybe_autocast(query.device.type, enabled=False):  # which would round the fp32 scores
        return mla_attention(query, key_nope, key_rope, value, scaling, attention_mask), None


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """From a mask `[B or 1, 1, S, S]`: each query's first visible key `[B or 1, S]` int32.

    A query that does not see its own key is padding, and sees nothing. Waits for the device once. ValueError for a
    mask that this cannot say.
    """
    if mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask: found one of shape {list(mask.shape)}, allowed [B or 1, 1, S, S] with "
            "attn_implementation='deepseek_v3'; 'sdpa' and 'eager' take one for each head"
        )
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    starts, seen = visible.int().argmax(-1), visible.sum(-1)
    own = torch.arange(visible.shape[1], device=mask.device)
    real = visible[:, own, own]
    if not is_tracing(mask) and not torch.all(~real | (starts + seen == own + 1)):
        raise ValueError(
            "attention_mask: found one with holes, or one that is not causal; with attn_implementation='deepseek_v3' "
            "every query has to see an unbroken run of keys that ends with its own"
        )
    return torch.where(real, starts, visible.shape[2]).to(torch.int32)


def _dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """What a matrix product multiplies `x` in: its own dtype, or under autocast that one's, except for fp64."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype


# Attention functions that take the rotary key once for all heads, by their `attn_implementation`.
SHARED_KEY_FUNCTIONS = {"deepseek_v3": shared_key_attention}
AttentionInterface.register("deepseek_v3", shared_key_attention)
AttentionMaskInterface.register("deepseek_v3", sdpa_mask)


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
        # -1: under tensor parallelism a rank holds only its share of the heads
        queries = self._queries(hidden_states).view(batch, length, -1, self.qk_head_dim)
        compressed = self.kv_a_proj_with_mqa(hidden_states)  # eq. 1 and 3
        latent, key_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        queries, key_rope = rotate_queries_and_key_(
            queries, key_rope, *position_embeddings, interleave=self.config.rope_interleave
        )
        latent, key_rope = self.kv_a_layernorm(latent).unsqueeze(1), key_rope.unsqueeze(1)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
        elif isinstance(cache, PagedAttentionCache):
            latent, key_rope = update_paged_cache(cache, latent, key_rope, self.layer_idx, kwargs)

        if self._absorbs(queries, latent, key_rope, attention_mask):
            output, weights = self._absorbed(queries, latent, key_rope, attention_mask), None
        else:
            output, weights = self._expanded(queries, latent, key_rope, attention_mask, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Eq. 6-9 before the rotation: `[B, S, H (n + r)]`."""
        if self.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def _absorbs(
        self, queries: torch.Tensor, latent: torch.Tensor, key_rope: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> bool:
        """Whether the absorbed form is right here, and cheaper."""
        length, total = queries.shape[1], latent.shape[2]
        if total <= length or (self.training and self.attention_dropout):
            return False
        if self.config._attn_implementation.removeprefix("paged|") == "eager":  # the definition, with its weights
            return False
        if not queries.dtype == latent.dtype == key_rope.dtype == _dtype_of_products(latent):
            return False
        if not (fits(latent) and fits(key_rope)):
            return False
        # A longer cache without a mask means "causal over an empty static cache" unless there is one query.
        # Masks other than a [B, 1, S, T] tensor (FlashAttention's 2-D, FlexAttention's block mask) stay with those.
        if attention_mask is None:
            usable_mask = length == 1
        else:
            usable_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4
            usable_mask = usable_mask and attention_mask.shape[1] == 1
        if not usable_mask or self._absorbed_flops(length, total) >= self._expanded_flops(length, total):
            return False
        weight = plain_weight(self.kv_b_proj, latent.dtype)
        if weight is None:
            return False
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, latent, key_rope, weight))
        return not (recorded and uses_triton(latent))  # mla_decode has no gradient there

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
        queries: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`queries [B, S, H, n + r]`, `latent [B, 1, T, c]`, `key_rope [B, 1, T, r]` -> `[B, S, H, v]` and weights."""
        batch, _, total, _ = latent.shape
        expanded = self.kv_b_proj(latent.squeeze(1)).view(batch, total, -1, self.qk_nope_head_dim + self.v_head_dim)
        key_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        implementation = self.config._attn_implementation.removeprefix("paged|")
        attend = SHARED_KEY_FUNCTIONS.get(implementation, with_expanded_key)
        if attention_mask is not None and total > queries.shape[1]:
            attend = with_expanded_key  # what is cached may have holes, and a static cache an empty end
        dropout = self.attention_dropout if self.training else 0.0
        return attend(
            self, queries, key_nope, key_rope, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )

    def _absorbed(
        self, queries: torch.Tensor, latent: torch.Tensor, key_rope: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `_expanded`, without ever making a key or a value."""
        batch, length, heads, _ = queries.shape
        query_nope, query_rope = queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        weight = plain_weight(self.kv_b_proj, latent.dtype)
        assert weight is not None  # `_absorbs` has asked
        weight = weight.view(heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        up_key, up_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)  # [H, n, c], [H, v, c]
        query_latent = torch.matmul(query_nope.transpose(1, 2), up_key).transpose(1, 2)
        context = mla_decode(
            query_latent, query_rope, latent.squeeze(1), key_rope.squeeze(1), self.scaling, attention_mask
        )
        # The large operand stands first and untransposed: on a CPU torch would copy a transposed bf16 one.
        return torch.matmul(up_value, context.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
