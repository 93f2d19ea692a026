"""Files: official names and layouts, exact round trips, and what loads."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from deepseek_v3 import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
)
from deepseek_v3.modeling_deepseek_v3 import tensor_shapes
from tests.modeling_deepseek_v3.checkpoints import (
    INDEX,
    PEAK,
    QUANTIZATION,
    SINGLE,
    assert_same_state,
    is_quantized,
    official_tensors,
    saved_tensors,
    write_official,
)
from tests.modeling_deepseek_v3.helpers import (
    build,
    randomize,
    relative_error,
    run_python,
    stock_twin,
    tiny_config,
    tokens,
)

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
