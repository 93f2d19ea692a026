"""Files written by others load unchanged, and files written by us load in stock transformers."""

import json

import pytest
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig

from deepseek_v3.configuration import PRESETS, DeepseekV3Config, preset

# deepseek-ai/DeepSeek-V3, config.json as first published
DEEPSEEK_V3 = """{
  "architectures": [
    "DeepseekV3ForCausalLM"
  ],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "auto_map": {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"
  },
  "aux_loss_alpha": 0.001,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": true,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "pretraining_tp": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [
      128,
      128
    ]
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn"
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "seq_aux": true,
  "tie_word_embeddings": false,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1",
  "use_cache": true,
  "v_head_dim": 128,
  "vocab_size": 129280
}
"""

# moonshotai/Moonlight-16B-A3B: no q_lora, no rope_scaling, no MTP layer
MOONLIGHT = json.dumps(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11264,
        "kv_lora_rank": 512,
        "max_position_embeddings": 8192,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
)
OURS = {"bias_update_speed", "seq_balance_coef", "mtp_loss_coef", "scoring_func", "topk_method", "moe_layer_freq"}


@pytest.fixture(params=[DEEPSEEK_V3, MOONLIGHT], ids=["deepseek-v3", "moonlight"])
def official(request, tmp_path):
    (tmp_path / "config.json").write_text(request.param)
    return tmp_path


def values(config):
    """Everything a configuration means, without what describes the process that holds it."""
    content = config.to_dict()
    return {k: v for k, v in content.items() if k not in ("transformers_version", "_name_or_path", "auto_map")}


def test_defaults_are_those_of_stock():
    ours, stock = DeepseekV3Config(), StockConfig()
    assert {k: getattr(ours, k) for k in values(stock)} == {k: getattr(stock, k) for k in values(stock)}
    assert set(values(ours)) - set(values(stock)) - {"output_router_logits"} == OURS  # stock has that one after 5.17
    assert (ours.bias_update_speed, ours.seq_balance_coef, ours.mtp_loss_coef) == (0.001, 1e-4, 0.3)


def test_official_file_reads_as_in_stock(official):
    ours, stock = DeepseekV3Config.from_pretrained(official), StockConfig.from_pretrained(official)
    content = values(stock)
    assert {k: getattr(ours, k) for k in content if k != "dtype"} == {k: v for k, v in content.items() if k != "dtype"}
    assert ours.dtype == stock.dtype
    assert ours.rope_parameters == stock.rope_parameters
    assert ours.seq_balance_coef == 1e-4  # not aux_loss_alpha


def test_official_file_equals_the_preset(official):
    ours = values(DeepseekV3Config.from_pretrained(official))
    name = "deepseek-v3-671b" if ours["vocab_size"] == 129280 else "moonlight-16b-a3b"
    for key, value in values(preset(name)).items():
        if key not in ("architectures", "dtype"):
            assert ours[key] == value, key


@pytest.mark.parametrize("name", PRESETS)
def test_what_we_save_loads_in_stock_and_in_ours(name, tmp_path):
    config = preset(name, bias_update_speed=0.002, num_labels=3)
    config.save_pretrained(tmp_path)
    assert values(DeepseekV3Config.from_pretrained(tmp_path)) == values(config)
    stock = StockConfig.from_pretrained(tmp_path)
    for key, value in values(config).items():
        assert getattr(stock, key) == value, key


def test_official_file_survives_our_save(official, tmp_path):
    before = DeepseekV3Config.from_pretrained(official)
    before.save_pretrained(tmp_path / "again")
    assert values(DeepseekV3Config.from_pretrained(tmp_path / "again")) == values(before)
    written, published = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "again", official))
    assert "auto_map" not in written  # its code is not in our folder
    for key in set(published) - {"auto_map", "torch_dtype", "transformers_version", "rope_scaling"}:
        assert written[key] == published[key], key
    # readers older than `rope_parameters` still find theta and the scaling
    assert (written["rope_scaling"] or {}).items() >= (published.get("rope_scaling") or {}).items()
    assert written["dtype"] == "bfloat16"


def test_saved_file_holds_every_field_and_no_runtime_choice(tmp_path):
    config = preset("tiny", attn_implementation="sdpa", experts_implementation="eager")
    config._left_by_some_tool = 1
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {"num_nextn_predict_layers", "scoring_func", "topk_method", "moe_layer_freq", "n_group"} <= set(written)
    assert not [k for k in written if k.startswith("_") or "implementation" in k or k == "head_dim"]
    assert DeepseekV3Config.from_pretrained(tmp_path, attn_implementation="eager")._attn_implementation == "eager"


def test_aliases_and_derived_sizes():
    config = preset("tiny", num_mtp_layers=2)
    assert (config.num_nextn_predict_layers, config.num_mtp_layers, config.num_local_experts) == (2, 2, 8)
    assert (config.head_dim, config.qk_head_dim, config.num_key_value_heads) == (8, 24, 4)
    assert DeepseekV3Config(num_local_experts=64).n_routed_experts == 64
    # stock writes both; they follow from the other dimensions, so the file's value is not trusted
    assert DeepseekV3Config(head_dim=63, qk_head_dim=1).head_dim == 64
    assert preset("tiny", n_group=None, topk_group=None).n_group == 1
    assert DeepseekV3Config(routed_scaling_factor=1).routed_scaling_factor == 1.0


def test_caller_keeps_its_dictionaries():
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    DeepseekV3Config(rope_scaling=scaling)
    assert set(scaling) == {"type", "factor", "original_max_position_embeddings"}
    preset("deepseek-v3-671b").rope_parameters["factor"] = 7
    assert preset("deepseek-v3-671b").rope_parameters["factor"] == 40


def test_plans_use_styles_that_transformers_has():
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    plan = DeepseekV3Config.base_model_tp_plan
    assert plan["layers.*.self_attn.kv_a_proj_with_mqa"] == "mla_kv_a_proj"
    assert plan.items() >= StockConfig.base_model_tp_plan.items()
    assert DeepseekV3Config.base_model_ep_plan == StockConfig.base_model_ep_plan
    assert DeepseekV3Config.base_model_pp_plan == StockConfig.base_model_pp_plan
    assert DeepseekV3Config.base_model_fsdp_plan == StockConfig.base_model_fsdp_plan
    assert all(style in ALL_PARALLEL_STYLES for style in plan.values())


def test_presets():
    assert preset("tiny", hidden_size=32).hidden_size == 32
    with pytest.raises(ValueError, match="found 'huge', allowed 'tiny', 'small', 'moonlight-16b-a3b', 'deep"):
        preset("huge")
    with pytest.raises(ValueError, match=r"preset\('tiny'\): found unknown fields \['hiden_size'\]"):
        preset("tiny", hiden_size=3)
