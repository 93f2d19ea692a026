"""GGUF metadata: the keys llama.cpp reads, its YaRN formulas, and tokenizers, read back with the gguf library."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from deepseek_v3.configuration import preset
from deepseek_v3.export import Source
from deepseek_v3.export.gguf import read_gguf
from deepseek_v3.export.gguf_metadata import pre_tokenizer_name, rope_scaling
from deepseek_v3.modeling_deepseek_v3.rope import DeepseekV3RotaryEmbedding, softmax_scale
from deepseek_v3.tokenization.files import MOONSHOT_PATTERN, ONE_DIGIT, THREE_DIGITS
from tests.export.gguf_models import ROWS, export_gguf, make_tokenizer, save_model
from tests.modeling_deepseek_v3.helpers import YARN, tiny_config

YARN_V3 = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
YARN_V3 |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "tiny", rms_norm_eps=1e-5, routed_scaling_factor=2.0)


def test_keys_that_llama_cpp_reads(base: Path, tmp_path: Path) -> None:
    found = fields(export_gguf(base, tmp_path, "Q8_0"))
    config = Source(base).config
    assert found["general.architecture"] == "deepseek2"
    assert (found["general.file_type"], found["general.quantization_version"]) == (7, 2)
    values = {key.removeprefix("deepseek2."): value for key, value in found.items() if key.startswith("deepseek2.")}
    assert values.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert values == {
        "block_count": 4,  # with the MTP layer
        "nextn_predict_layers": 1,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": ROWS,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "leading_dense_block_count": 1,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": 1,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_weights_scale": 2.0,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": 10000.0,
    }


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_parameters": YARN_V3}, {"q_lora_rank": None, "norm_topk_prob": False}]
)
def test_the_configuration_comes_back(overrides: dict, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", bias_update_speed=0.005, **overrides)
    found, expected = read_gguf(export_gguf(folder, tmp_path / "out", "BF16")), Source(folder).config.to_dict()
    config = found.config.to_dict()
    differing = {key for key in expected if config.get(key) != expected[key]}
    assert differing <= {"dtype", "transformers_version", "_name_or_path", "bias_update_speed"}, differing
    assert not differing & found.fields and "rope_parameters" in found.fields


def test_groups_that_are_no_limit_become_one(tmp_path: Path) -> None:
    """llama.cpp aborts on as many groups used as there are."""
    folder = save_model(tmp_path / "tiny", n_group=4, topk_group=4)
    found = fields(export_gguf(folder, tmp_path / "out", "F32"))
    assert (found["deepseek2.expert_group_count"], found["deepseek2.expert_group_used_count"]) == (1, 1)


def test_deepseeks_own_scaling_has_deepseeks_own_metadata(tmp_path: Path) -> None:
    """As in the published GGUF files of V3: 0.1 * mscale_all_dim, and no factor for the rotation."""
    found = fields(export_gguf(save_model(tmp_path / "tiny", rope_parameters=YARN_V3), tmp_path / "out", "F32"))
    scaling = {key.rsplit(".", 1)[1]: value for key, value in found.items() if ".rope.scaling." in key}
    assert scaling.pop("yarn_log_multiplier") == pytest.approx(0.1)
    expected = {"type": "yarn", "factor": 40.0, "original_context_length": 4096}
    assert scaling == {**expected, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}


ropes = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": st.floats(1.01, 100)},
    optional={
        "mscale": st.floats(0, 4),
        "mscale_all_dim": st.floats(0, 4),
        "attention_factor": st.floats(0.3, 3),
    },
)


@given(ropes | st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1.01, 100)}))
def test_llama_cpps_formulas_give_the_models_factors(rope: dict[str, Any]) -> None:
    extra = {"rope_theta": 1e4} | ({"original_max_position_embeddings": 64} if rope["rope_type"] == "yarn" else {})
    config = tiny_config(rope_parameters={**rope, **extra})
    attention_factor, multiplier = rope_scaling(config)
    log = 0.1 * math.log(rope["factor"])
    # llama-context.cpp and deepseek2.cpp, with all their cancelling factors
    yarn_factor = attention_factor
    if rope["rope_type"] == "yarn":
        yarn_factor *= (1.0 if multiplier else 1 + log) / (1 + log)
    rotation = yarn_factor * (1 + log) if rope["rope_type"] == "yarn" else yarn_factor  # ops.cpp, rope_yarn
    scores = (yarn_factor * (1 + log) * (1 + 0.1 * multiplier * math.log(rope["factor"]))) ** 2
    assert rotation == pytest.approx(DeepseekV3RotaryEmbedding(config).attention_scaling, rel=1e-6)
    assert scores * config.qk_head_dim**-0.5 == pytest.approx(softmax_scale(config), rel=1e-6)


@pytest.mark.parametrize("scaling", [YARN, YARN_V3, {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}])
def test_scaled_positions_come_back(scaling: dict, tmp_path: Path) -> None:
    source = Source(save_model(tmp_path / "tiny", rope_parameters=scaling))
    config = read_gguf(export_gguf(source.folder, tmp_path / "out", "F32")).config
    found, expected = DeepseekV3RotaryEmbedding(config), DeepseekV3RotaryEmbedding(source.config)
    assert found.inv_freq.equal(expected.inv_freq)
    assert found.attention_scaling == pytest.approx(expected.attention_scaling, rel=1e-6)
    assert softmax_scale(config) == pytest.approx(softmax_scale(source.config), rel=1e-6)


def test_tokens_and_their_kinds(base: Path, tmp_path: Path) -> None:
    found, tokenizer = fields(export_gguf(base, tmp_path, "F32")), make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == ROWS
    assert {token: i for i, token in enumerate(tokens[: len(vocabulary)])} == vocabulary
    kind_of = dict(zip(tokens, kinds, strict=True))
    assert kind_of["<｜begin▁of▁sentence｜>"] == kind_of["<｜User｜>"] == TokenType.CONTROL
    assert kind_of["<think>"] == TokenType.USER_DEFINED
    assert kind_of["Ġaspirin" if "Ġaspirin" in vocabulary else "a"] == TokenType.NORMAL
    assert set(kinds[len(vocabulary) :]) == {TokenType.UNUSED} and len(set(tokens)) == ROWS
    assert all(len(merge.split(" ")) == 2 for merge in found["tokenizer.ggml.merges"])
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "deepseek-v3"
    special = [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")]
    assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def content(pre_tokenizer: Any, **changes: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=changes.pop("ignore_merges", False)))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.normalizer = changes.pop("normalizer", None)
    return json.loads(tokenizer.to_str())


def split(pattern: str, regex: bool = False) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])


def test_names_of_pre_tokenizers() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pre_tokenizer_name(content(split(THREE_DIGITS), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer_name(content(split(THREE_DIGITS))) == "dbrx"
    assert pre_tokenizer_name(content(split(ONE_DIGIT))) == "qwen2"
    assert pre_tokenizer_name(content(split(MOONSHOT_PATTERN), ignore_merges=True)) == "kimi-k2"
    assert pre_tokenizer_name(content(pre_tokenizers.Sequence([digits, byte_level]))) == "smollm"
    assert pre_tokenizer_name(content(byte_level)) == "gpt-2"


@pytest.mark.parametrize("unknown", [split("\\w+"), split("", regex=False), pre_tokenizers.ByteLevel(), None])
def test_an_unknown_pre_tokenizer_is_refused(unknown: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer.json: pre_tokenizer is .* allowed in GGUF are those of deep"):
        pre_tokenizer_name(content(unknown))


def test_a_normalizer_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer.json: normalizer is NFC, allowed in GGUF is none"):
        pre_tokenizer_name(content(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC()))


def test_a_token_that_strips_spaces_is_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    folder = save_model(tmp_path / "tiny")
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer.json: '<mask>' has lstrip"):
        export_gguf(folder, tmp_path / "out", "F32")


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", vocab_size=300)
    with pytest.raises(ValueError, match="config.vocab_size is 300"):
        export_gguf(folder, tmp_path / "out", "F32")


def test_v3s_own_configuration_is_fine() -> None:
    assert rope_scaling(preset("deepseek-v3-671b"))[0] == pytest.approx(1.0)
