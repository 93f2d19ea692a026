"""Exact parameter counts from the configuration alone: no model is built, so 671B takes microseconds."""

from dataclasses import dataclass

from .configuration_deepseek_v3 import DeepseekV3Config


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model holds and uses.

    The published figures of DeepSeek-V3, and where they are here:

    - "671B total" is `total`: 671.03e9, the main model.
    - "37B activated" is `activated`: 36.63e9 (their README_WEIGHTS says 36.6B). The output head counts, the embedding
      table does not, since a token reads one row of it.
    - "11.5B unique" of the MTP module is `mtp` without `eh_proj`: 11.51e9. `mtp` counts that projection: 11.61e9.
    - The MTP module shares embedding and head (0.93e9 each) with the main model, and the official checkpoint stores
      both again under `model.layers.61`: that is `mtp_with_shared`, 13.46e9.
    - "685B on Hugging Face = 671B main + 14B MTP" is `total + mtp_with_shared`, 684.49e9; the 14 is 685 - 671.

    The routing bias `e_score_correction_bias` is a buffer, set by a rule and not by gradients (2.1.2). It is in no
    count except `routing_bias`, so `total` equals `sum(p.numel() for p in model.parameters())` without MTP layers.

    Attributes:
        total: parameters of the main model; a tied head adds none.
        activated: main-model parameters that multiply the hidden state of one token.
        mtp: parameters that exist only in the MTP layers; 0 without any.
        embedding: the embedding table.
        head: the output head; 0 if tied to the embedding.
        routing_bias: elements of all `e_score_correction_bias` buffers, MTP layers included.
    """

    total: int
    activated: int
    mtp: int
    embedding: int
    head: int
    routing_bias: int

    @property
    def mtp_with_shared(self) -> int:
        """`mtp` plus the embedding and head it shares with the main model; 0 without MTP layers."""
        return self.mtp + self.embedding + self.head if self.mtp else 0


def _attention(config: DeepseekV3Config) -> int:
    """MLA with its two latent norms (2.1.1)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_out = heads * config.qk_head_dim
    kv_a_out = config.kv_lora_rank + config.qk_rope_head_dim
    if config.q_lora_rank is None:
        query, biases = hidden * q_out, 0  # q_proj never has a bias
    else:
        query, biases = config.q_lora_rank * (hidden + 1 + q_out), config.q_lora_rank
    key_value = hidden * kv_a_out + config.kv_lora_rank * (1 + heads * (config.qk_nope_head_dim + config.v_head_dim))
    biases = biases + kv_a_out + hidden if config.attention_bias else 0
    return query + key_value + heads * config.v_head_dim * hidden + biases


def num_parameters(config: DeepseekV3Config) -> ParameterCount:
    """Count the parameters of the model that `config` describes.

    Example:
        >>> num_parameters(DeepseekV3Config()).total
        671026404352
    """
    hidden = config.hidden_size
    expert = 3 * hidden * config.moe_intermediate_size
    block = _attention(config) + 2 * hidden  # with its two RMSNorms

    dense_layer = block + 3 * hidden * config.intermediate_size
    moe_fixed = block + config.n_routed_experts * hidden + config.n_shared_experts * expert  # router, shared experts
    moe_layer = moe_fixed + config.n_routed_experts * expert
    moe_layer_active = moe_fixed + config.num_experts_per_tok * expert

    dense_layers = min(config.first_k_dense_replace, config.num_hidden_layers)
    moe_layers = config.num_hidden_layers - dense_layers
    mtp_layers = config.num_nextn_predict_layers  # each with eh_proj, enorm, hnorm and shared_head.norm on top
    mtp_dense = min(max(config.first_k_dense_replace - config.num_hidden_layers, 0), mtp_layers)
    mtp_moe = mtp_layers - mtp_dense
    table = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else table

    return ParameterCount(
        total=table + dense_layers * dense_layer + moe_layers * moe_layer + hidden + head,
        activated=dense_layers * dense_layer + moe_layers * moe_layer_active + hidden + table,
        mtp=mtp_dense * dense_layer + mtp_moe * moe_layer + mtp_layers * (2 * hidden * hidden + 3 * hidden),
        embedding=table,
        head=head,
        routing_bias=(moe_layers + mtp_moe) * config.n_routed_experts,
    )
