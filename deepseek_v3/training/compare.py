"""What a pretrained model is measured against: compressors, an n-gram model, a dense model of equal compute."""

from typing import Any

from ..configuration import DeepseekV3Config, num_parameters
from ..data import gzip_bits_per_byte, ngram_bits_per_byte
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..modeling_deepseek_v3.layers import DeepseekV3MLP
from .recipe import kernels
from .text import TextData, documents


def baselines(data: TextData, vocab_size: int) -> dict[str, float]:
    """Bits per byte of gzip -9 and of a 5-gram model (modified Kneser-Ney over the model's own tokens)."""
    corpus = data.corpus
    five_gram = ngram_bits_per_byte(
        documents(data.train),
        documents(data.heldout),
        vocab_size=vocab_size,
        heldout_bytes=corpus.heldout_bytes,
        order=5,
    )
    return {"gzip": gzip_bits_per_byte(corpus.heldout), "5-gram": five_gram}


def dense_twin(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    """A new model with every MoE layer replaced by a dense one as wide as a token's experts together.

    The layers that are dense already keep their width, and the kernels are those of `config`.
    """
    values: dict[str, Any] = config.to_dict()
    active = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
    values["first_k_dense_replace"] = config.num_hidden_layers + config.num_nextn_predict_layers
    values["intermediate_size"] = active
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(values, **kernels(config)))
    if active != config.intermediate_size:  # a configuration has one width for all its dense layers
        for layer in model.model.layers[: config.first_k_dense_replace]:
            layer.mlp = DeepseekV3MLP(config, config.intermediate_size).apply(model._init_weights)
    return model


def training_flops(config: DeepseekV3Config, sequence_length: int) -> float:
    """FLOPs per trained token, forward and backward: 6 per activated parameter (output head and MTP layers with
    their use of the head included, embedding lookups not), plus causal attention over half a row. MTP layers rest,
    and count for nothing, with `mtp_loss_coef` 0."""
    counts, depth = num_parameters(config), config.num_nextn_predict_layers if config.mtp_loss_coef else 0
    layers = config.num_hidden_layers + depth
    idle_experts = config.n_routed_experts - config.num_experts_per_tok
    idle = 3 * config.hidden_size * config.moe_intermediate_size * idle_experts  # of each MoE layer
    mtp_moe = min(max(layers - config.first_k_dense_replace, 0), depth)
    active = counts.activated
    if depth:
        active += counts.mtp - mtp_moe * idle + depth * config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6 * active + 6 * layers * width * sequence_length / 2
