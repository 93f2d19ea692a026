"""The transformer: decoder layers of MLA and (from `first_k_dense_replace` on) DeepSeekMoE, paper 2.1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from ..configuration import DeepseekV3Config
from .attention import SHARED_KEY_FUNCTIONS, DeepseekV3Attention, visible_keys
from .checkpoint import CheckpointMixin, own_config
from .layers import DeepseekV3Embedding, DeepseekV3MLP, DeepseekV3RMSNorm
from .moe import DeepseekV3Experts, DeepseekV3MoE, DeepseekV3TopkRouter
from .rope import DeepseekV3RotaryEmbedding


@dataclass
class DeepseekV3ModelOutput(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast` plus `router_indices`: the experts chosen in each MoE layer, `[B*S, K]` int64."""

    router_indices: tuple[torch.Tensor, ...] | None = None


class DeepseekV3DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block. Returns a flat tuple, so either kind of gradient checkpointing carries the router's outputs."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = DeepseekV3MLP(config, config.intermediate_size) if dense else DeepseekV3MoE(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`[B, S, H]` -> the same, router logits `[B*S, E]`, experts `[B*S, K]` (both None in a dense layer)."""
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        normed, hidden_states = self.post_attention_layernorm(attention_output, hidden_states)
        if isinstance(self.mlp, DeepseekV3MoE):
            output, router_logits, router_indices = self.mlp(normed)
            return hidden_states + output, router_logits, router_indices
        return hidden_states + self.mlp(normed), None, None


class DeepseekV3PreTrainedModel(CheckpointMixin, PreTrainedModel):
    """What all heads share: initialisation, loading and saving, and what transformers needs to know of the model."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DeepseekV3DecoderLayer, "attentions": DeepseekV3Attention}
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init__(self, config: DeepseekV3Config, *args, **kwargs) -> None:
        super().__init__(own_config(config), *args, **kwargs)

    # transformers decides both by searching the source of the module that holds the class.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or "deepseek_v3")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekV3TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekV3Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class DeepseekV3Model(DeepseekV3PreTrainedModel):
    """Embedding, decoder layers, final norm. A causal language model appends its MTP layers to `layers`."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        config = self.config
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = DeepseekV3Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> DeepseekV3ModelOutput:
        """`input_ids` or `inputs_embeds` `[B, S(, H)]` -> final-normed hidden states `[B, S, H]`.

        `position_ids` that restart at 0 within a row declare packed documents, which then do not attend to each other;
        ValueError where FlashAttention could not keep them apart.
        `output_router_logits=True` returns `router_logits` and `router_indices` of every MoE layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        causal_mask = packed_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        router_logits: tuple[torch.Tensor, ...] = ()
        router_indices: tuple[torch.Tensor, ...] = ()
        counting = self.training and torch.is_grad_enabled()
        token_mask = real_tokens(attention_mask, inputs_embeds.shape[1])
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states, logits, indices = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if indices is None:
                continue
            if counting:  # here, outside the checkpointed layer, so that recomputation does not count again
                layer.mlp.gate.count_load(indices, None if token_mask is None else token_mask.flatten())
            if output_router_logits:
                router_logits, router_indices = (*router_logits, logits), (*router_indices, indices)

        return DeepseekV3ModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=router_logits if output_router_logits else None,
            router_indices=router_indices if output_router_logits else None,
        )


def packed_causal_mask(
    config: DeepseekV3Config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> Any:
    """transformers' causal mask, with packed documents kept apart when there is a padding mask too.

    transformers looks for documents in `position_ids [B, S]` only without a mask `[B, S]` and without a cache, even
    an empty one. ValueError for documents that FlashAttention would let see each other.
    """
    same_document: Callable | None = None
    if position_ids is not None and past_key_values is None:
        if "flash" in (config._attn_implementation or ""):
            _check_flash_documents(config._attn_implementation, inputs_embeds, attention_mask, position_ids)
        elif (real := real_tokens(attention_mask, inputs_embeds.shape[1])) is not None:
            documents = document_numbers(position_ids, real)
            if is_tracing(documents) or documents.any():
                same_document = packed_sequence_mask_function(documents)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=same_document,
    )
    if mask is not None and past_key_values is None and config._attn_implementation in SHARED_KEY_FUNCTIONS:
        mask = visible_keys(mask)  # once, for all layers
    return mask


def document_numbers(position_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """From `position_ids [B or 1, S]`, the packed document of each token of a row, counted from 0: `[B, S]` int64.

    A document begins at each real token (`real [B, S]` bool) of position 0; the other positions may count padding or
    leave it out.

    >>> document_numbers(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[True, True, False, True, True]])).tolist()
    [[0, 0, 0, 1, 1]]
    """
    return (real & (position_ids == 0) & (real.cumsum(dim=1) > 1)).cumsum(dim=1)


def _check_flash_documents(
    implementation: str, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
) -> None:
    """FlashAttention reads documents from `position_ids` in a batch of one row without padding only."""
    batch, length = inputs_embeds.shape[:2]
    if is_tracing(inputs_embeds) or (batch == 1 and attention_mask is None):
        return
    real = real_tokens(attention_mask, length)
    real = position_ids.new_ones(batch, length, dtype=torch.bool) if real is None else real
    if (batch > 1 or not real.all()) and document_numbers(position_ids, real).any():
        raise ValueError(
            f"position_ids: found packed documents in {batch} rows with {int((~real).sum())} padding tokens; "
            f"attn_implementation={implementation!r} keeps documents apart in 1 row without padding only; "
            "allowed for others: 'sdpa', 'eager', 'deepseek_v3'"
        )


def real_tokens(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The padding mask of the last `length` tokens, `[B, length]` bool; None where nothing is known to be padding.

    `attention_mask [B, T]` begins with what a cache holds.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:].bool()
