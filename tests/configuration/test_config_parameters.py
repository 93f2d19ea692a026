"""Counts agree with the published figures and with models that stock transformers builds."""

import dataclasses

import pytest
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig

from deepseek_v3.configuration import DeepseekV3Config, num_parameters, preset

CONFIGS = {
    "tiny": preset("tiny"),
    "small": preset("small"),
    "moonlight": preset("moonlight-16b-a3b"),
    "671b, 5 layers": preset("deepseek-v3-671b", num_hidden_layers=5),
    "tied, biased": preset("tiny", tie_word_embeddings=True, attention_bias=True),
    "biased, no q_lora": preset("tiny", q_lora_rank=None, attention_bias=True, n_shared_experts=2),
    "all dense": preset("tiny", first_k_dense_replace=9),
    "no dense": preset("tiny", first_k_dense_replace=0),
}


def built(factory):
    with torch.device("meta"):
        return factory()


def numel(tensors):
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_total_is_what_stock_builds(config):
    model = built(lambda: stock.DeepseekV3ForCausalLM(StockConfig(**config.to_diff_dict())))
    count = num_parameters(config)
    assert count.total == numel(model.parameters())
    assert count.embedding == model.get_input_embeddings().weight.numel()
    assert count.head == (0 if config.tie_word_embeddings else model.lm_head.weight.numel())
    biases = numel(b for name, b in model.named_buffers() if "e_score_correction_bias" in name)
    moe_mtp = config.first_k_dense_replace <= config.num_hidden_layers
    mtp_biases = moe_mtp * config.num_nextn_predict_layers * config.n_routed_experts
    assert count.routing_bias == biases + mtp_biases
    # activated: all but the experts not chosen and the embedding table, which as a tied head multiplies after all
    experts = numel(p for name, p in model.named_parameters() if ".mlp.experts." in name)
    idle = experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    assert count.activated == count.total - idle - (0 if config.tie_word_embeddings else count.embedding)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_mtp_is_what_stock_builds(config):
    layers = pytest.importorskip("transformers.modeling_layers")
    # Stock gives its MTP layers their own numbering from 0; DeepSeek's, and ours, goes on after the main layers.
    first_dense = int(config.first_k_dense_replace > config.num_hidden_layers)
    mtp_config = StockConfig(**{**config.to_diff_dict(), "first_k_dense_replace": first_dense})
    mtp = built(
        lambda: layers.MtpLayer(mtp_config, stock.DeepseekV3DecoderLayer, stock.DeepseekV3RMSNorm, layer_idx=0)
    )
    assert num_parameters(config).mtp == config.num_nextn_predict_layers * numel(mtp.parameters())


def test_published_figures_of_deepseek_v3():
    config = preset("deepseek-v3-671b")
    count = num_parameters(config)
    assert count == num_parameters(DeepseekV3Config())
    assert round(count.total / 1e9) == 671
    assert round(count.activated / 1e9) == 37
    assert round(count.activated / 1e9, 1) == 36.6  # README_WEIGHTS
    assert round((count.mtp - 2 * config.hidden_size**2) / 1e9, 1) == 11.5
    assert round(count.embedding / 1e9, 1) == round(count.head / 1e9, 1) == 0.9
    assert 684e9 < count.total + count.mtp_with_shared < 685e9


def test_published_figures_of_moonlight():
    """Table 3 of arXiv 2502.16982 gives 15.29B and 2.24B without embeddings."""
    count = num_parameters(preset("moonlight-16b-a3b"))
    assert round((count.total - count.embedding - count.head) / 1e9, 2) == 15.29
    assert round((count.activated - count.head) / 1e9, 2) == 2.24
    assert (count.mtp, count.mtp_with_shared) == (0, 0)


def test_tiny_is_tiny_and_the_count_is_frozen():
    count = num_parameters(preset("tiny"))
    assert count.total + count.mtp < 1_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        count.total = 1
