"""Every refusal is a ValueError that names the field, what was found and what is allowed."""

import json
import re

import pytest
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from deepseek_v3.configuration import DeepseekV3Config, preset

NAN, INF = float("nan"), float("inf")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

REFUSED = [
    ({"hidden_size": "abc"}, "hidden_size: found 'abc', allowed an integer from 1 to 131072"),
    ({"hidden_size": -1}, "hidden_size: found -1, allowed an integer from 1"),
    ({"hidden_size": 0}, "hidden_size: found 0, allowed an integer from 1"),
    ({"hidden_size": 64.0}, "hidden_size: found 64.0, allowed an integer"),
    ({"hidden_size": True}, "hidden_size: found True, allowed an integer"),
    ({"num_attention_heads": 0}, "num_attention_heads: found 0, allowed an integer from 1"),
    ({"num_key_value_heads": 2}, "num_key_value_heads: found 2, allowed num_attention_heads = 4"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: found 7, allowed an even number"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers: found 1000000, allowed an integer from 1 to 1024"),
    ({"vocab_size": 10**9}, "vocab_size: found 1000000000, allowed an integer from 1 to 16777216"),
    ({"n_routed_experts": 10**7}, "n_routed_experts: found 10000000, allowed an integer from 2 to 16384"),
    ({"num_mtp_layers": 10**6}, "num_nextn_predict_layers: found 1000000, allowed an integer from 0 to 64"),
    ({"q_lora_rank": 0}, "q_lora_rank: found 0, allowed an integer from 1 to 131072 or null"),
    ({"num_experts_per_tok": 99}, "num_experts_per_tok: found 99, allowed at most .* 8 / 4 \\* 2 = 4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok: found 5, allowed at most .* 8 / 4 \\* 2 = 4"),
    ({"n_group": 3}, "n_group: found 3, allowed a divisor of n_routed_experts = 8"),
    ({"n_group": 8}, "n_group: found 8, allowed at most n_routed_experts / 2 = 4"),
    ({"topk_group": 5}, "topk_group: found 5, allowed at most n_group = 4"),
    ({"rms_norm_eps": NAN}, "rms_norm_eps: found nan, allowed a number from 1e-20 to 1"),
    ({"rms_norm_eps": INF}, "rms_norm_eps: found inf, allowed"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps: found -1e-06, allowed"),
    ({"bias_update_speed": NAN}, "bias_update_speed: found nan, allowed a number from 0 to 1"),
    ({"seq_balance_coef": NAN}, "seq_balance_coef: found nan, allowed a number from 0 to 100"),
    ({"mtp_loss_coef": -0.1}, "mtp_loss_coef: found -0.1, allowed a number from 0 to 100"),
    ({"routed_scaling_factor": 10**400}, "routed_scaling_factor: found 1000.*, allowed a number"),
    ({"scoring_func": "softmax"}, "scoring_func: found 'softmax', allowed 'sigmoid'"),
    ({"topk_method": "greedy"}, "topk_method: found 'greedy', allowed 'noaux_tc'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq: found 2, allowed 1"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', allowed 'silu'"),
    ({"use_cache": "yes"}, "use_cache: found 'yes', allowed bool"),
    ({"pad_token_id": 1024}, "pad_token_id: found 1024, allowed from 0 to vocab_size - 1 = 1023"),
    ({"bos_token_id": -1}, "bos_token_id: found -1, allowed from 0 to vocab_size - 1 = 1023"),
    ({"eos_token_id": [1, 5000]}, "eos_token_id: found \\[1, 5000\\], allowed from 0 to vocab_size - 1 = 1023"),
    ({"rope_parameters": {**YARN, "factor": 0}}, "rope_parameters\\['factor'\\]: found 0, allowed a number from 1"),
    ({"rope_parameters": {**YARN, "factor": NAN}}, "rope_parameters\\['factor'\\]: found nan, allowed a number"),
    ({"rope_parameters": {**YARN, "beta_fast": 0.5}}, "\\['beta_slow'\\]: found 1, allowed at most beta_fast = 0.5"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters\\['rope_theta'\\]: found 'big', allowed a number"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings'\\]: found None"),
    ({"rope_parameters": {"type": "longrope"}}, "rope_parameters\\['rope_type'\\]: found 'longrope', allowed one of"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters\\['full_attention'\\]: found {}, allowed a single"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters\\['rope_theta'\\]: found -1.0, allowed a number"),
    ({"rope_scaling": "yarn"}, "rope_scaling: found 'yarn', allowed an object or null"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings'\\]: found None, allowed"),
    ({"rope_parameters": {"rope_theta": 5e4}, "rope_theta": 1e4}, "rope_theta'\\]: found 50000.0, allowed 10000.0"),
    ({"dtype": "float31"}, "dtype: found 'float31', allowed one of float64"),
    ({"torch_dtype": "nn"}, "dtype: found 'nn', allowed one of float64"),
    ({"num_labels": 10**9}, "num_labels: found 1000000000, allowed an integer from 0"),
    ({"id2label": {"a": "b"}}, "id2label: found {'a': 'b'}, allowed an object from label numbers"),
    ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal: found 'evil/kernel', allowed"),
    ({"_anything": 1}, "_anything: found 1, allowed no private keys"),
    ({"to_dict": 1}, "to_dict: found 1, allowed no such key"),
    ({"attribute_map": {"hidden_size": "x"}}, "attribute_map: found .* allowed no such key"),
    ({"base_model_tp_plan": {}}, "base_model_tp_plan: found {}, allowed no such key"),
    ({"per_layer_config": {"0": {"hidden_size": 1}}}, "per_layer_config: found .* allowed no such key"),
]


def name_of(value):
    return json.dumps(value, default=str)[:60] if isinstance(value, dict) else ""


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=name_of)
def test_refused_by_the_constructor_and_from_a_file(values, message, tmp_path):
    content = preset("tiny").to_dict() | ({} if "rope_parameters" in values else {"rope_parameters": None}) | values
    with pytest.raises(ValueError, match=message):
        DeepseekV3Config(**content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    for load in (DeepseekV3Config.from_pretrained, DeepseekV3Config.from_dict):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path) if load == DeepseekV3Config.from_pretrained else content)


@pytest.mark.parametrize(
    "values",
    [
        {"first_k_dense_replace": 9},  # all layers dense: what truncating a published model gives
        {"num_experts_per_tok": 4},
        {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
        {"eos_token_id": [1, 1023], "pad_token_id": 1023},
        {"rms_norm_eps": 1, "attention_dropout": None, "bias_update_speed": 0},
        {"rope_parameters": {**YARN, "mscale": None}},
        {"_name_or_path": "x", "_commit_hash": "y", "_attn_implementation_autoset": True},
        {"auto_map": {"AutoConfig": "x.Y"}, "aux_loss_alpha": 0.001, "ep_size": 1, "model_type": "deepseek_v3"},
        {"per_layer_config": None, "num_labels": 4},
    ],
    ids=name_of,
)
def test_accepted(values):
    config = DeepseekV3Config(**(preset("tiny").to_dict() | values))
    config.validate()
    assert DeepseekV3Config.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation"]
)
def test_kernels_are_chosen_by_the_caller_and_never_by_a_file(key, tmp_path):
    assert getattr(DeepseekV3Config(**{key: "eager"}), "_" + key.lstrip("_")) == "eager"
    preset("tiny").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    chosen = DeepseekV3Config.from_pretrained(tmp_path, **{key.lstrip("_"): "eager"})
    assert getattr(chosen, "_" + key.lstrip("_")) == "eager"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "someone/kernel"}))
    with pytest.raises(ValueError, match=f"{key}: found 'someone/kernel', allowed no such key in a file; pass"):
        DeepseekV3Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply, allowed 32 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ('{"self": 1}', "self: found 1"),
        ("[]", "found a JSON list, allowed a JSON object"),
        ('{"vocab_size": ', "not valid JSON"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
    ids=["lists", "objects", "forty", "self", "list", "cut", "digits", "latin-1"],
)
def test_unreadable_file_is_named(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text, encoding="latin-1")
    for load, path in ((DeepseekV3Config.from_pretrained, tmp_path), (DeepseekV3Config.from_json_file, file)):
        with pytest.raises(ValueError, match=("" if "self" in text else re.escape(str(file)) + ": .*") + message):
            load(path)


def test_overrides_are_validated(tmp_path):
    preset("tiny").save_pretrained(tmp_path)
    assert DeepseekV3Config.from_pretrained(tmp_path, num_hidden_layers=2).num_hidden_layers == 2
    _, unused = DeepseekV3Config.from_pretrained(tmp_path, other=1, return_unused_kwargs=True)
    assert unused == {"other": 1}
    with pytest.raises(ValueError, match="num_experts_per_tok: found 99"):
        DeepseekV3Config.from_pretrained(tmp_path, num_experts_per_tok=99)


def test_later_assignment_is_checked_at_once_or_when_saved(tmp_path):
    config = preset("tiny")
    with pytest.raises(ValueError, match="hidden_size: found 'abc', allowed an integer from 1"):
        config.hidden_size = "abc"
    config.rope_parameters = {"rope_type": "default"}
    with pytest.raises(ValueError, match=r"rope_parameters\['rope_theta'\]: found None, allowed a number"):
        config.validate()
    config.n_group = 3  # may become right with the next assignment
    with pytest.raises(ValueError, match="n_group: found 3, allowed a divisor"):
        config.save_pretrained(tmp_path)


def test_strict_subclass_keeps_the_checks():
    @strict
    class Longer(DeepseekV3Config):
        extra: int = 1

    assert Longer(extra=2).extra == 2
    with pytest.raises(Exception, match="n_group: found 3, allowed a divisor"):
        Longer(n_group=3)


def test_auto_config_reaches_the_checks(tmp_path):
    registered = AutoConfig.for_model("deepseek_v3").__class__
    AutoConfig.register("deepseek_v3", DeepseekV3Config, exist_ok=True)
    try:
        preset("tiny").save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        assert type(AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")) is DeepseekV3Config
        file.write_text(file.read_text().replace("{", '{"_attn_implementation_internal": "evil/kernel",', 1))
        with pytest.raises(ValueError, match="_attn_implementation_internal: found 'evil/kernel'"):
            AutoConfig.from_pretrained(tmp_path)
    finally:
        AutoConfig.register("deepseek_v3", registered, exist_ok=True)
