"""Files: official names and layouts, exact round trips, FP8 blocks, and what must be refused."""

import json
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from deepseek_v3 import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
)
from deepseek_v3.modeling_deepseek_v3 import tensor_shapes
from tests.modeling_deepseek_v3.helpers import (
    build,
    randomize,
    relative_error,
    run_python,
    stock_twin,
    tiny_config,
    tokens,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def official_tensors(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of DeepSeek's files, without help of the code under test."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        prefix, dot, fused = name.partition(".experts.")
        if not dot:
            tensors[name] = tensor.clone()
            continue
        for expert in range(config.n_routed_experts):
            parts = tensor[expert].chunk(2) if fused == "gate_up_proj" else [tensor[expert]]
            kinds = ["gate_proj", "up_proj"] if fused == "gate_up_proj" else ["down_proj"]
            for kind, part in zip(kinds, parts, strict=True):
                tensors[f"{prefix}.experts.{expert}.{kind}.weight"] = part.clone()
    for k in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + k}"
        tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def write_official(folder: Path, config: DeepseekV3Config, tensors: dict[str, torch.Tensor], shards: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    if not shards:
        save_file(tensors, folder / SINGLE)
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors"  # DeepSeek's own numbering
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_state(found: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    return build(tiny_config(num_nextn_predict_layers=2))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2, "attention_bias": True},
        {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2},
        {"first_k_dense_replace": 9},
        {"tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_saved_names_shapes_and_dtypes_are_official(overrides: dict, max_shard_size: str, tmp_path) -> None:
    model = build(tiny_config(**overrides)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tensors = saved_tensors(tmp_path)
    config = model.config

    shapes = {name: tuple(tensor.shape) for name, tensor in official_tensors(model).items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    copies = {name for name in shapes if name.endswith(("shared_head.head.weight", ".embed_tokens.weight"))}
    copies -= {"model.embed_tokens.weight"}
    assert len(copies) == 2 * config.num_nextn_predict_layers
    for name in copies | {"lm_head.weight"}:
        shapes.pop(name, None)
    assert tensor_shapes(config, mtp=True) == shapes
    assert tensor_shapes(config, mtp=False) == {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < config.num_hidden_layers
    }
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 if max_shard_size == "100KB" else [file.name for file in files] == [SINGLE]
    if len(files) > 1:
        weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        assert set(weight_map) == set(tensors)


def test_official_names_spelled_out(saved) -> None:
    """From DeepSeek's own index, with this model's layer numbers: 3 main layers, so MTP is layers 3 and 4."""
    assert {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.4.mlp.experts.0.gate_proj.weight",
        "model.layers.4.shared_head.head.weight",
        "model.layers.4.shared_head.norm.weight",
    } <= set(saved_tensors(saved))


def test_saved_values_are_the_models_and_copies_are_copies(model, saved) -> None:
    expected, found = official_tensors(model), saved_tensors(saved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_config_file_names_the_stock_class_and_no_kernel(saved) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert not [key for key in config if "implementation" in key or key in ("auto_map", "quantization_config")]


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers."), type(model)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info.get("error_msgs"), info
    print(*sorted(info["unexpected_keys"]))
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[1])).logits, folder + "/logits.pt")
assert not [name for name in sys.modules if name.split(".")[0] == "deepseek_v3"]
"""


def test_stock_transformers_loads_our_files(tmp_path) -> None:
    """In an interpreter that never imports this package."""
    rows = tokens(2, 12)
    torch.save(rows, tmp_path / "rows.pt")
    models = {"fp32": build(tiny_config(num_nextn_predict_layers=2)), "bf16": build().bfloat16()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    lines = run_python(STOCK, tmp_path / "rows.pt", *(tmp_path / name for name in models)).splitlines()
    for (name, model), unexpected in zip(models.items(), lines, strict=True):
        mtp = tuple(f"model.layers.{3 + k}." for k in range(model.config.num_nextn_predict_layers))
        assert unexpected and all(key.startswith(mtp) for key in unexpected.split())
        with torch.no_grad():
            expected = model(rows).logits
        found = torch.load(tmp_path / name / "logits.pt")
        assert found.dtype == expected.dtype == model.dtype
        assert relative_error(found, expected) < (3e-6 if name == "fp32" else 0.05)


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_round_trip_is_exact(dtype, tied: bool, max_shard_size: str, tmp_path) -> None:
    model = build(tiny_config(num_nextn_predict_layers=2, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    assert_same_state(loaded, model.state_dict())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    left_out = ("architectures", "dtype", "_name_or_path")
    before, after = (
        {key: value for key, value in config.to_diff_dict().items() if key not in left_out}
        for config in (model.config, loaded.config)
    )
    assert before == after


def test_saving_again_changes_no_byte_of_a_tensor(saved, tmp_path) -> None:
    DeepseekV3ForCausalLM.from_pretrained(saved).save_pretrained(tmp_path)
    before, after = saved_tensors(saved), saved_tensors(tmp_path)
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_saved_state_dict_argument_is_used(model, tmp_path) -> None:
    """As accelerate and FSDP call it: with the gathered tensors."""
    state = {name: tensor + 1 if name == "lm_head.weight" else tensor for name, tensor in model.state_dict().items()}
    before = set(state)
    model.save_pretrained(tmp_path, state_dict=state)
    assert set(state) == before
    found = saved_tensors(tmp_path)
    for name in ("lm_head.weight", "model.layers.3.shared_head.head.weight"):
        assert torch.equal(found[name], model.lm_head.weight + 1), name


def test_generation_config_travels(tmp_path) -> None:
    model = build()
    model.generation_config = GenerationConfig(max_new_tokens=17, eos_token_id=5)
    model.save_pretrained(tmp_path)
    assert DeepseekV3ForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [0, 3])
def test_official_files_load(shards: int, dtype, tmp_path) -> None:
    model = build(tiny_config(num_nextn_predict_layers=2)).to(dtype)
    write_official(tmp_path, model.config, official_tensors(model), shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DeepseekV3ForCausalLM
    assert_same_state(loaded, model.state_dict())


@pytest.mark.parametrize("shards", [0, 3])
def test_frequencies_of_rope_in_the_file_are_not_read(shards: int, model, tmp_path) -> None:
    """Moonlight's files hold them per layer, as those of early Llamas did; stock leaves them out, too."""
    tensors = official_tensors(model)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0) for i in range(3)}
    write_official(tmp_path, model.config, {**tensors, **frequencies}, shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model.state_dict())
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    loaded.save_pretrained(tmp_path / "again")
    assert not any("inv_freq" in name for name in saved_tensors(tmp_path / "again"))


def test_mtp_copies_may_be_absent(model, tmp_path) -> None:
    tensors = official_tensors(model)
    for name in [n for n in tensors if n.endswith(("3.embed_tokens.weight", "shared_head.head.weight"))]:
        del tensors[name]
    write_official(tmp_path, model.config, tensors)
    assert_same_state(DeepseekV3ForCausalLM.from_pretrained(tmp_path), model.state_dict())


def test_files_with_fused_experts_load(model, tmp_path) -> None:
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in saved_tensors(tmp_path)
    assert_same_state(DeepseekV3ForCausalLM.from_pretrained(tmp_path), model.state_dict())


def test_dtype_and_kernels_are_arguments(saved) -> None:
    arguments = {"dtype": torch.bfloat16, "attn_implementation": "eager", "experts_implementation": "batched_mm"}
    loaded = DeepseekV3ForCausalLM.from_pretrained(saved, **arguments)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager" and loaded.config._experts_implementation == "batched_mm"
    assert DeepseekV3ForCausalLM.from_pretrained(saved).config._experts_implementation == "deepseek_v3"


# --- other heads ---------------------------------------------------------------------------------------------------


def backbone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layers = tuple(f"model.layers.{i}." for i in range(3))
    kept = ("model.embed_tokens.", "model.norm.", *layers)
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith(kept)}


def test_base_model_loads_from_a_causal_lm(model, saved) -> None:
    loaded = AutoModel.from_pretrained(saved)
    assert type(loaded) is DeepseekV3Model
    assert_same_state(loaded, backbone(model.state_dict()))


@pytest.mark.parametrize("cls", [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification])
def test_classifiers_load_from_a_causal_lm_and_from_their_own_files(cls, model, saved, tmp_path) -> None:
    loaded = cls.from_pretrained(saved, num_labels=5)
    assert_same_state(loaded.model, backbone(model.state_dict()))
    assert loaded.score.weight.shape == (5, 64) and loaded.score.weight.isfinite().all()
    loaded.save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert again.config.num_labels == 5 and not info["missing_keys"]
    assert_same_state(again, loaded.state_dict())
    assert_same_state(AutoModel.from_pretrained(tmp_path), loaded.model.state_dict())


def test_base_model_files_load(model, saved, tmp_path) -> None:
    base = DeepseekV3Model.from_pretrained(saved)
    base.save_pretrained(tmp_path)
    assert_same_state(DeepseekV3Model.from_pretrained(tmp_path), base.state_dict())
    with pytest.raises(ValueError, match="missing: .*lm_head.weight"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def stock_saved(model, tmp_path_factory) -> Path:
    """What stock transformers writes: the configuration promises MTP layers, the file has none."""
    folder = tmp_path_factory.mktemp("stock")
    stock_twin(model).save_pretrained(folder)
    assert not [name for name in saved_tensors(folder) if name.startswith(("model.layers.3.", "model.layers.4."))]
    return folder


def test_files_without_mtp_are_refused_with_a_hint(stock_saved) -> None:
    assert json.loads((stock_saved / "config.json").read_text())["num_nextn_predict_layers"] == 2
    with pytest.raises(ValueError, match=r"missing: .*model\.layers\.3.*pass num_nextn_predict_layers=0") as caught:
        DeepseekV3ForCausalLM.from_pretrained(stock_saved)
    assert str(stock_saved) in str(caught.value)


@pytest.mark.parametrize("way", ["argument", "alias", "config"])
def test_files_without_mtp_load_without_mtp(way: str, model, stock_saved) -> None:
    config = DeepseekV3Config.from_pretrained(stock_saved, num_nextn_predict_layers=0)
    ways = {"argument": {"num_nextn_predict_layers": 0}, "alias": {"num_mtp_layers": 0}, "config": {"config": config}}
    loaded = DeepseekV3ForCausalLM.from_pretrained(stock_saved, attn_implementation="eager", **ways[way])
    assert loaded.mtp_layers == []
    with torch.no_grad():
        assert relative_error(loaded(tokens(1, 8)).logits, model(tokens(1, 8)).logits) < 1e-6


def test_fewer_mtp_layers_than_the_file_holds(model, saved) -> None:
    """A model may leave MTP layers out, but not silently because of a typo in num_hidden_layers."""
    loaded = DeepseekV3ForCausalLM.from_pretrained(saved, num_nextn_predict_layers=0)
    assert set(loaded.state_dict()) == {f"model.{name}" for name in backbone(model.state_dict())} | {"lm_head.weight"}
    with pytest.raises(ValueError, match="unexpected"):
        DeepseekV3ForCausalLM.from_pretrained(saved, num_hidden_layers=2)


# --- FP8 blocks ----------------------------------------------------------------------------------------------------

FP8_CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,  # kv_a_proj_with_mqa has 576 rows: 4.5 blocks
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def is_quantized(name: str) -> bool:
    """DeepSeek's choice: the projections; not the router, norms, embedding, head and eh_proj."""
    return name.endswith("_proj.weight") and not name.endswith("eh_proj.weight") or "kv_a_proj_with_mqa" in name


def quantize(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, ...]:
    """E4M3 codes, one scale per block, and what they stand for, block by block."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = (codes[part].float() * scales[i, j]).bfloat16()
    return codes, scales, meant


def fp8_checkpoint(folder: Path, shards: int = 0, block: tuple[int, int] = (128, 128)):
    """An FP8 checkpoint in `folder`; returns the bf16 tensors it stands for."""
    model = build(tiny_config(**FP8_CONFIG)).bfloat16()
    stored, meant = {}, {}
    for name, tensor in official_tensors(model).items():
        if is_quantized(name):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantize(tensor, block)
        else:
            stored[name] = meant[name] = tensor
    assert sum(name.endswith("_scale_inv") for name in stored) == 5 * 3 + 3 + 2 * 3 * (4 + 1)
    assert "model.layers.2.self_attn.o_proj.weight_scale_inv" in stored  # the MTP layer
    model.config.dtype = torch.bfloat16
    write_official(folder, model.config, stored, shards)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**QUANTIZATION, "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("shards, block", [(0, (128, 128)), (3, (128, 128)), (0, (64, 32))])
def test_fp8_blocks_are_dequantized_exactly(shards: int, block: tuple[int, int], tmp_path) -> None:
    meant = fp8_checkpoint(tmp_path / "fp8", shards, block)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    found = official_tensors(loaded)
    assert set(found) == set(meant)
    for name, tensor in meant.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert getattr(loaded.config, "quantization_config", None) is None
    loaded(tokens(1, 5))

    loaded.save_pretrained(tmp_path / "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16")
    assert_same_state(again, loaded.state_dict())


def test_fp8_files_are_read_anew_by_each_load(tmp_path) -> None:
    for block in ((128, 128), (64, 32)):
        meant = fp8_checkpoint(tmp_path / "fp8", block=block)  # rounded differently
        weight = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8").model.layers[0].self_attn.o_proj.weight
        assert torch.equal(weight, meant["model.layers.0.self_attn.o_proj.weight"].to(weight.dtype))
        shutil.rmtree(tmp_path / "fp8")


def test_fp8_blocks_load_in_another_dtype_and_into_other_heads(tmp_path) -> None:
    meant = fp8_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, num_nextn_predict_layers=0)
    stored = saved_tensors(tmp_path)
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :192]
    assert torch.equal(loaded.get_parameter(name), stored[name].float() * scale) and loaded.mtp_layers == []
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.get_parameter(name.removeprefix("model.")), meant[name])
    classifier = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.get_parameter(name), meant[name]) and classifier.score.out_features == 3


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{KV_A}_scale_inv"), f"{KV_A} is F8_E4M3 without"),
        (lambda t: t.update({KV_A: t[KV_A].bfloat16()}), f"{KV_A} is BF16 with"),
        (lambda t: t.update({f"{KV_A}_scale_inv": t[f"{KV_A}_scale_inv"][:4]}), r"is \[4, 2\] in .* needs \[5, 2\]"),
        (lambda t: t.pop(KV_A), f"1 missing: {KV_A}"),
        (lambda t: t.update({"model.layers.0.other.weight_scale_inv": torch.ones(1, 1)}), "unexpected: .*other"),
    ],
)
def test_broken_fp8_files_are_refused(change, message: str, tmp_path) -> None:
    fp8_checkpoint(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("block", [None, 128, [128], [128, 0], [128, 128.0], "128x128"])
def test_fp8_block_size_is_checked(block, tmp_path) -> None:
    fp8_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_block_size"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


# --- what must be refused ------------------------------------------------------------------------------------------

CLASSES = [DeepseekV3ForCausalLM, DeepseekV3Model, DeepseekV3ForSequenceClassification]
Q_A = "model.layers.1.self_attn.q_a_proj.weight"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q_A), f"1 missing: {Q_A}"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1." in n], r"missing: .* \(\d+ in all\)"),
        (lambda t: t.update({"model.layers.1.self_attn.typo.weight": torch.ones(2)}), "1 unexpected: .*attn.typo"),
        (lambda t: t.update({Q_A: t[Q_A][:-1].clone()}), rf"1 of another shape: {Q_A} is \[47, 64\]"),
        (lambda t: t.update({Q_A: t[Q_A].T.contiguous()}), rf"{Q_A} is \[64, 48\].*needs \[48, 64\]"),
        (lambda t: (t.clear(), t.update({"bert.encoder.weight": torch.ones(2)})), r"missing: .*1 unexpected: bert"),
        (lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight"), "1 missing: .*experts.7.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(32, 64)}),
            "1 unexpected: .*experts.8.up_proj.weight",
        ),
        (lambda t: t.pop("model.layers.2.mlp.gate.e_score_correction_bias"), "1 missing: .*e_score_correction_bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_counted(change, message: str, cls, folder) -> None:
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        cls.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_mismatched_sizes_load_when_asked_for(model, folder) -> None:
    change_tensors(folder, lambda t: t.update({Q_A: t[Q_A][:-1].clone()}))
    loaded, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [key[0] for key in info["mismatched_keys"]] == [Q_A]
    assert loaded.get_parameter(Q_A).isfinite().all()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_missing_mtp_tensor_is_refused(folder) -> None:
    change_tensors(folder, lambda t: t.pop("model.layers.3.eh_proj.weight"))
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.3\.eh_proj"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**entries: dict) -> bytes:
    return json.dumps(entries).encode()


TWICE = b"{%s, %s}" % ((b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}',) * 2)
MANY_KEYS = b'{"a": 1, %s "a": 2}' % b"".join(b'"%d": 1, ' % i for i in range(200_000))
BROKEN_FILES = {
    "empty": (lambda f: f.write_bytes(b""), "0 bytes"),
    "seven bytes": (lambda f: f.write_bytes(b"1234567"), "7 bytes"),
    "header of 2^63 bytes": (lambda f: write_raw(f, b"{}", length=2**63), str(2**63)),
    "header of 200 MB": (lambda f: write_raw(f, b"{}", length=200_000_000), "200000000"),
    "header past the end": (lambda f: write_raw(f, b"{}", length=3), "header of 3 bytes"),
    "no json": (lambda f: write_raw(f, b"{not json"), "not valid JSON"),
    "no utf-8": (lambda f: write_raw(f, b'{"\xff\xfe": 1}'), "not valid JSON"),
    "a list": (lambda f: write_raw(f, b"[]"), "is a list"),
    "nested": (lambda f: write_raw(f, b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    "nested objects": (lambda f: write_raw(f, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "huge integer": (lambda f: write_raw(f, b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON|a: header entry"),
    "duplicate key": (lambda f: write_raw(f, TWICE, b"0" * 8), "duplicate key 'a'"),
    "duplicate among many keys": (lambda f: write_raw(f, MANY_KEYS), "duplicate key 'a'"),
    "a name of a megabyte": (lambda f: write_raw(f, header(**{"x" * 2**20: 3})), "xxx: header entry is 3"),
    "an entry of a megabyte": (lambda f: write_raw(f, header(a="x" * 2**20)), "a: header entry is 'xxx"),
    "unexpected names of a megabyte": (
        lambda f: write_raw(f, header(**{"x" * 2**20: entry(shape=[0], offsets=[0, 0])})),
        "1 unexpected: xxx",
    ),
    "entry is no object": (lambda f: write_raw(f, b'{"a": 3}'), "a: header entry is 3"),
    "bad dtype": (lambda f: write_raw(f, header(a=entry("F99")), b"0" * 8), "a: dtype is 'F99'"),
    "no dtype": (lambda f: write_raw(f, header(a={}), b"0" * 8), "a: dtype is None"),
    "dtype is a list": (lambda f: write_raw(f, header(a=entry([])), b"0" * 8), r"a: dtype is \[\]"),
    "shape is a number": (lambda f: write_raw(f, header(a=entry(shape=2)), b"0" * 8), "a: shape is 2"),
    "negative size": (lambda f: write_raw(f, header(a=entry(shape=[-2])), b"0" * 8), r"a: shape is \[-2\]"),
    "size is true": (lambda f: write_raw(f, header(a=entry(shape=[True])), b"0" * 8), r"a: shape is \[True\]"),
    "overflowing shape": (lambda f: write_raw(f, header(a=entry(shape=[2**39] * 8)), b"0" * 8), "a: 8 bytes"),
    "shape and bytes differ": (lambda f: write_raw(f, header(a=entry(shape=[3])), b"0" * 8), "a: 8 bytes .* needs 12"),
    "offsets backwards": (lambda f: write_raw(f, header(a=entry(offsets=[8, 0])), b"0" * 8), "a: data_offsets 8..0"),
    "offsets are text": (lambda f: write_raw(f, header(a=entry(offsets="08")), b"0" * 8), "a: data_offsets are '08'"),
    "negative offset": (lambda f: write_raw(f, header(a=entry(offsets=[-8, 0])), b"0" * 8), "a: data_offsets -8"),
    "past the end": (lambda f: write_raw(f, header(a=entry(offsets=[8, 16])), b"0" * 8), "a: .*outside the file's 8"),
    "overlap": (lambda f: write_raw(f, header(a=entry(), b=entry(offsets=[4, 12])), b"0" * 12), "b: data starts at"),
    "hole": (lambda f: write_raw(f, header(a=entry(), b=entry(offsets=[12, 20])), b"0" * 20), "b: data starts at"),
    "bytes left over": (lambda f: write_raw(f, header(a=entry()), b"0" * 9), "9 bytes of data"),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-1000]), "truncated"),
    "truncated in the header": (lambda f: f.write_bytes(f.read_bytes()[:200]), "not a whole safetensors file"),
    "a pickle": (lambda f: torch.save({"a": torch.ones(2)}, f), "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_refused_by_name(name: str, folder) -> None:
    damage, message = BROKEN_FILES[name]
    damage(folder / SINGLE)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        DeepseekV3ForCausalLM.from_pretrained(folder)
    assert str(folder / SINGLE if name != "unexpected names of a megabyte" else folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - start < 5


@pytest.fixture
def sharded(model, tmp_path) -> Path:
    write_official(tmp_path / "model", model.config, official_tensors(model), shards=2)
    return tmp_path / "model"


def remap(folder: Path, target: str) -> None:
    """Point one tensor of the index at `target`."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_A] = target
    (folder / INDEX).write_text(json.dumps(index))


def outside(folder: Path) -> Path:
    """A whole file with the tensor, beside the model's folder."""
    file = folder.parent / "secret.safetensors"
    shutil.copy(folder / "model-00001-of-000002.safetensors", file)
    return file


def link(folder: Path, name: str, target: Path | str) -> str:
    (folder / name).symlink_to(target)
    return name


def linked_folder(folder: Path) -> str:
    outside(folder)
    (folder / "sub").symlink_to(folder.parent)
    return "sub/secret.safetensors"


BROKEN_INDEXES = {
    "parent folder": (lambda f: remap(f, f"../{outside(f).name}"), "leaves the model folder"),
    "parent folder and back": (lambda f: remap(f, "../model/model-00001-of-000002.safetensors"), "leaves the model"),
    "absolute": (lambda f: remap(f, str(outside(f))), "leaves the model folder"),
    "symbolic link": (lambda f: remap(f, link(f, "x.safetensors", outside(f))), "leaves the model folder"),
    "link to a link": (
        lambda f: remap(f, link(f, "y.safetensors", f / link(f, "x.safetensors", outside(f)))),
        "leaves the model folder",
    ),
    "linked folder": (lambda f: remap(f, linked_folder(f)), "leaves the model folder"),
    "device": (lambda f: remap(f, "/dev/zero"), "is not the name of a safetensors file"),
    "no file name": (lambda f: remap(f, 7), "7 is not the name"),
    "a null byte": (lambda f: remap(f, "\0.safetensors"), "is not the name of a safetensors file"),
    "an overlong name": (lambda f: remap(f, "x" * 5000 + ".safetensors"), "is not the name of a safetensors file"),
    "half a character": (lambda f: remap(f, "\ud800.safetensors"), "is not the name of a safetensors file"),
    "another extension": (lambda f: remap(f, "pytorch_model.bin"), "is not the name of a safetensors file"),
    "absent file": (lambda f: remap(f, "model-00009-of-000002.safetensors"), "has no such file"),
    "a folder": (lambda f: (f / "d.safetensors").mkdir() or remap(f, "d.safetensors"), "has no such file"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "weight_map is NoneType"),
    "weight_map is a list": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "weight_map is list"),
    "weight_map is empty": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "weight_map is NoneType"),
    "index is no json": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index is no utf-8": (lambda f: (f / INDEX).write_bytes(b"\xff"), "not valid JSON"),
    "index with a duplicate": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        "duplicate key 'a'",
    ),
    "index is nested": (lambda f: (f / INDEX).write_text("[" * 100_000 + "]" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN_INDEXES)
def test_broken_indexes_are_refused_by_name(name: str, sharded) -> None:
    damage, message = BROKEN_INDEXES[name]
    damage(sharded)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        DeepseekV3ForCausalLM.from_pretrained(sharded)
    assert str(sharded / INDEX) in str(caught.value)
    assert time.monotonic() - start < 5


def test_tensor_in_another_shard_than_the_index_says(sharded) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = ({*index.values()} - {index[Q_A]}).pop()
    remap(sharded, other)
    with pytest.raises(ValueError, match=f"{other}.*{Q_A}"):
        DeepseekV3ForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("shard", [0, 1])
def test_tensor_in_two_shards_is_refused(shard: int, sharded) -> None:
    """Which of them would count is decided by the order of the files."""
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    name = next(name for name, file in index.items() if file == files[shard])
    other = sharded / files[1 - shard]
    save_file({**load_file(other), name: torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=name):
        DeepseekV3ForCausalLM.from_pretrained(sharded)


def test_missing_and_truncated_shards_are_refused_by_name(sharded) -> None:
    file = sharded / "model-00002-of-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=str(file)):
        DeepseekV3ForCausalLM.from_pretrained(sharded)
    file.unlink()
    with pytest.raises(ValueError, match=file.name):
        DeepseekV3ForCausalLM.from_pretrained(sharded)


def test_single_file_that_links_out_is_refused(folder) -> None:
    shutil.move(folder / SINGLE, folder.parent / "secret.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "secret.safetensors")
    with pytest.raises(ValueError, match="outside the model folder"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def test_pickles_are_not_read(folder) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(ValueError, match="no weights found"):
        DeepseekV3ForCausalLM.from_pretrained(folder)
    torch.save({"lm_head.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="found pytorch_model.bin, but only safetensors"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"hidden_size": "wide"}', '{"n_group": 7}'])
def test_broken_configuration_is_refused(content: str, folder) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError):
        DeepseekV3ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shards", [0, 2])
def test_hub_cache_loads(model, shards: int, tmp_path) -> None:
    """Every file of a snapshot is a relative link to a blob beside the snapshots."""
    write_official(tmp_path / "plain", model.config, official_tensors(model), shards)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / ("0" * 40), tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.move(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert_same_state(DeepseekV3ForCausalLM.from_pretrained(snapshot), model.state_dict())


@pytest.mark.parametrize("sizes", [["5GB"], ["100KB"], ["5GB", "100KB"], ["100KB", "5GB"]])
def test_subfolder_and_variant_load(model, sizes: list[str], tmp_path) -> None:
    for size in sizes:
        model.save_pretrained(tmp_path / "inner", variant="fp32", max_shard_size=size)
    names = ("model.fp32.safetensors", "model.safetensors.index.fp32.json")  # one of them: that of the last save
    assert [(tmp_path / "inner" / name).exists() for name in names] == [sizes[-1] == "5GB", sizes[-1] != "5GB"]
    arguments = {"subfolder": "inner", "variant": "fp32"}
    assert_same_state(DeepseekV3ForCausalLM.from_pretrained(tmp_path, **arguments), model.state_dict())


PEAK = """
import sys, threading, time
from pathlib import Path
from deepseek_v3 import DeepseekV3ForCausalLM

def memory():  # without the pages of mapped files, which the system takes back when it needs them
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

DeepseekV3ForCausalLM.from_pretrained(sys.argv[1])
samples = [memory()]
done = threading.Event()

def watch():
    while not done.wait(0.001):
        samples.append(memory())

thread = threading.Thread(target=watch)
thread.start()
model = DeepseekV3ForCausalLM.from_pretrained(sys.argv[2])
done.set()
thread.join()
print(max(samples) - samples[0])
print(sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_loading_needs_little_more_memory_than_the_model(fp8: bool, tmp_path) -> None:
    """Measured after a tiny model has paid for what every load needs."""
    sizes = {"hidden_size": 384, "moe_intermediate_size": 256, "n_routed_experts": 32, "num_hidden_layers": 6}
    model = build(tiny_config(**sizes)).bfloat16()
    tensors = official_tensors(model)
    if fp8:
        for name in [name for name in tensors if is_quantized(name)]:
            tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in tensors[name].shape])
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    model.config.dtype = torch.bfloat16
    write_official(tmp_path / "large", model.config, tensors, shards=3)
    if fp8:
        config = json.loads((tmp_path / "large" / "config.json").read_text())
        (tmp_path / "large" / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    build().save_pretrained(tmp_path / "tiny")
    # Freed memory goes back at once, so that live memory is measured and not malloc's reserve (then up to 1.65).
    output = run_python(PEAK, tmp_path / "tiny", tmp_path / "large", MALLOC_MMAP_THRESHOLD_="65536")
    growth, size = map(int, output.split())
    assert 90e6 < size < 200e6
    assert 0.9 * size < growth < 1.3 * size, growth / size


def test_header_reading_does_not_touch_the_data(saved) -> None:
    """`scan_folder` answers from the headers; the library agrees on every entry."""
    from deepseek_v3.modeling_deepseek_v3.weight_files import scan_folder

    entries = scan_folder(saved)
    with safe_open(saved / SINGLE, framework="pt") as file:
        assert set(entries) == set(file.keys())
        for name, (path, dtype, shape) in entries.items():
            assert path == saved / SINGLE
            view = file.get_slice(name)
            assert (dtype, list(shape)) == (view.get_dtype(), view.get_shape())


@pytest.mark.parametrize("shards", [1, 3])
def test_load_state_dict_takes_the_tensors_of_the_files(tmp_path: Path, shards: int) -> None:
    """`Trainer` resumes so, shard by shard and without strictness: experts must not stay as they were."""
    saved, loaded = build(), randomize(build(), seed=2)
    size = sum(p.numel() * 4 for p in saved.parameters()) // shards + 1
    saved.save_pretrained(tmp_path, max_shard_size="1GB" if shards == 1 else size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1)
    for file in files:
        missing, unexpected = loaded.load_state_dict(load_file(file), strict=False)
        if shards == 1:
            assert not missing and not unexpected
    for (name, expected), found in zip(saved.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


def test_load_state_dict_reports_experts_that_do_not_fit() -> None:
    """Names and shapes, as torch does for every other tensor; nothing is broadcast."""
    model = build()
    name = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    width, half = model.config.hidden_size, model.config.moe_intermediate_size
    for shape in ((1, width), (half + 1, width)):
        with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(name.format(0))}"):
            model.load_state_dict({name.format(0): torch.ones(shape)}, strict=False)
    beyond = name.format(model.config.n_routed_experts)
    assert model.load_state_dict({beyond: torch.ones(half, width)}, strict=False).unexpected_keys == [beyond]
    with torch.device("meta"):
        empty = DeepseekV3ForCausalLM(model.config)
    state = {
        f"model.layers.1.mlp.experts.{e}.{p}.weight": torch.ones((width, half) if p == "down_proj" else (half, width))
        for e in range(model.config.n_routed_experts)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    empty.load_state_dict(state, strict=False, assign=True)
    assert all((p == 1).all() and not p.is_meta for p in empty.model.layers[1].mlp.experts.parameters())


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_save_replaces_one_that_was_sharded_otherwise(tmp_path: Path, sharded_first: bool) -> None:
    """Or transformers would read the old weights, or an index of files that are gone."""
    old, new = build(tiny_config()), build(tiny_config())
    with torch.no_grad():
        new.lm_head.weight.add_(1)
    sizes = ["100KB", "5GB"] if sharded_first else ["5GB", "100KB"]
    for model, size in zip((old, new), sizes, strict=True):
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert torch.equal(DeepseekV3ForCausalLM.from_pretrained(tmp_path).lm_head.weight, new.lm_head.weight)
    (tmp_path / ("model.safetensors.index.json" if sharded_first else "model.safetensors")).touch()
    with pytest.raises(ValueError, match="has model.safetensors and model.safetensors.index.json"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
