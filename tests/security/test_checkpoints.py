"""Hostile checkpoints: configuration, index, weights. What `test_checkpoint_refused.py` refuses already is here run
with limits on time and memory, through the Auto classes."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from deepseek_v3.configuration.patterns import pattern_problem
from deepseek_v3.export import export
from deepseek_v3.export.source import Source
from deepseek_v3.modeling_deepseek_v3.checkpoint import linear_shapes, tensor_shapes
from deepseek_v3.modeling_deepseek_v3.weight_files import MAX_ITEMS, MAX_JSON_BYTES, find_nonfinite
from tests.modeling_deepseek_v3.helpers import tiny_config
from tests.security.conftest import edit
from tests.security.limits import GROWTH_BYTES, assert_cheap, assert_refused, limited

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BOMB = "(a+)+$"
MODULES = [f"model.layers.{i}.mlp.experts.{i}.kv_a_proj_with_mqa" for i in range(60)]


def load(folder: Path):
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def test_limits_see_time_memory_crashes_and_hangs(monkeypatch) -> None:
    assert limited(lambda: bytearray(b"1") * (300 * 2**20)).growth > GROWTH_BYTES
    assert limited(lambda: sum(range(10_000_000))).seconds > 0.05
    assert limited(lambda: bytearray(2**40)).classes[0] == "MemoryError"
    assert limited(os.abort).classes == ["Crash"]
    assert limited(lambda: 1 / 0).classes[0] == "ZeroDivisionError"
    monkeypatch.setattr("tests.security.limits.WALL_SECONDS", 0.3)
    assert limited(lambda: os.read(os.pipe()[0], 1)).classes == ["Timeout"]


def test_the_undamaged_checkpoint_loads_within_the_limits(checkpoint) -> None:
    outcome = limited(load(checkpoint))
    assert outcome.loaded, str(outcome)
    assert_cheap(outcome)


# --- configuration -------------------------------------------------------------------------------------------------

EXPERTS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 16384}
CONFIGS = {
    "experts of no file": (EXPERTS, "missing"),
    "experts in many layers": (EXPERTS | {"num_hidden_layers": 1024}, "n_routed_experts: found 16384, allowed at"),
    "few experts in many layers": (
        EXPERTS | {"n_routed_experts": 256, "num_hidden_layers": 1024},
        "n_routed_experts: found 256, allowed at most 131072 / 1024 MoE layers = 128",
    ),
    "experts in MTP layers": (EXPERTS | {"num_nextn_predict_layers": 64}, "n_routed_experts: found 16384"),
    "10^7 experts": ({"n_routed_experts": 10**7}, "n_routed_experts: found 10000000"),
    "layers of no file": ({"num_hidden_layers": 1024}, "missing"),
    "10^6 layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers: found 1000000"),
    "largest vocabulary": ({"vocab_size": 2**24}, "lm_head.weight is [600, 64]"),
    "10^9 tokens": ({"vocab_size": 10**9}, "vocab_size: found 1000000000"),
    "largest width": ({"hidden_size": 2**17}, "the configuration needs [600, 131072]"),
    "labels": ({"num_labels": 2**20}, "num_labels: found 1048576, allowed an integer from 0 to 131072"),
    "label names": ({"id2label": {str(i): "x" for i in range(2**17 + 1)}}, "id2label: found"),
    "label number": ({"id2label": {"9" * 4000: "x"}}, "id2label: found"),
    "experts per token": ({"num_experts_per_tok": 99}, "num_experts_per_tok: found 99"),
    "YaRN factor": ({"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 64}}, "factor"),
    "private key": ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal: found"),
    "kernel": ({"attn_implementation": "evil/kernel"}, "attn_implementation: found 'evil/kernel'"),
    "long key": ({"x" * 10**6: {"a": 1}, "hidden_size": -1}, "hidden_size: found -1"),
    "long private key": ({"_" + "x" * 10**6: 1}, "allowed no private keys"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_is_refused_soon(name: str, folder) -> None:
    values, message = CONFIGS[name]
    content = json.loads((folder / "config.json").read_text()) | values
    if "rope_scaling" in values:
        del content["rope_parameters"], content["rope_theta"]
    (folder / "config.json").write_text(json.dumps(content))
    assert_refused(limited(load(folder)), folder, message)


@pytest.mark.parametrize("name", ["experts of no file", "layers of no file", "10^6 layers", "largest width", "kernel"])
def test_an_export_refuses_the_configuration_soon(name: str, folder) -> None:
    edit(folder / "config.json", **CONFIGS[name][0])
    assert_refused(limited(lambda: Source(folder)), folder)


@pytest.mark.slow
def test_as_many_labels_as_allowed_are_cheap(folder) -> None:
    edit(folder / "config.json", num_labels=2**17)
    outcome = limited(lambda: DeepseekV3ForSequenceClassification.from_pretrained(folder))
    assert outcome.loaded and outcome.seconds < 3 and outcome.growth < 2**28, str(outcome)


TEXTS = {"nested": "[" * 100_000, "nested objects": '{"a":' * 100_000, "digits": '{"a": 1' + "0" * 5000, "cut": "{"}
TEXTS["small objects"] = '{"a": [' + "[]," * 1_000_000 + "[]]}"
TEXTS["megabytes"] = '{"comment": "' + "x" * 2**24 + '"}'


@pytest.mark.parametrize("text", TEXTS)
def test_unreadable_configuration_names_the_file(text: str, folder) -> None:
    (folder / "config.json").write_text(TEXTS[text])
    assert_refused(limited(lambda: DeepseekV3ForCausalLM.from_pretrained(folder)), folder / "config.json")
    if text != "small objects":  # the Auto classes parse the file before any class of this package is chosen
        assert_cheap(limited(lambda: AutoConfig.from_pretrained(folder)))


def test_nothing_prompts(folder) -> None:
    """transformers asks on a terminal whether to run a repository's code; here its code is never needed."""
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (folder / "evil.py").write_text("raise SystemExit(7)")
    edit(folder / "config.json", auto_map=auto_map)
    outcome = limited(load(folder))
    assert outcome.loaded, str(outcome)
    assert_cheap(outcome)


def test_a_model_without_weights_is_estimated_before_it_is_built(monkeypatch) -> None:
    config = tiny_config(vocab_size=2**24, hidden_size=2**12)  # 2 x 256 GiB
    assert_refused(limited(lambda: AutoModelForCausalLM.from_config(config)), "parameters", "bytes of memory")
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).lm_head.weight.shape == (2**24, 2**12)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="allowed are 10,000 bytes of memory; or pass allow_large=True"):
        AutoModelForCausalLM.from_config(tiny_config())
    assert AutoModelForCausalLM.from_config(tiny_config(), allow_large=True).dtype == torch.float32
    with init_empty_weights():
        AutoModelForCausalLM.from_config(tiny_config())


# --- quantization_config -------------------------------------------------------------------------------------------


def compressed(**changes) -> dict:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights | changes.pop("weights", {})}
    common = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return {**common, "config_groups": {"group_0": group | changes.pop("group", {})}, **changes}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTIZATIONS = {
    "a list": [],
    "a text": "fp8",
    "no method": {},
    "method is a number": {"quant_method": 5},
    "method is a list": {"quant_method": ["fp8"]},
    "unknown method": {"quant_method": "nope"},
    "a method of a library that loads code": {"quant_method": "torchao", "quant_type": "int8"},
    "a method with kernels from the Hub": {"quant_method": "mxfp4"},
    "another known method": {"quant_method": "gptq", "bits": 4},
    "block of 0": FP8 | {"weight_block_size": [0, 128]},
    "block of text": FP8 | {"weight_block_size": "128"},
    "block of True": FP8 | {"weight_block_size": [True, True]},
    "activation scheme": FP8 | {"activation_scheme": "evil"},
    "skipped modules": FP8 | {"modules_to_not_convert": [BOMB]},
    "bitsandbytes, skipped": {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": [BOMB]},
    "bitsandbytes, dtype": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "os.system"
    },
    "group of 0": compressed(weights={"group_size": 0}),
    "group of -1": compressed(weights={"group_size": -1}),
    "group of 2^60": compressed(weights={"group_size": 2**60}),
    "10^9 bits": compressed(weights={"num_bits": 10**9}),
    "no groups": compressed(config_groups={}),
    "groups are a list": compressed(config_groups=[1]),
    "target pattern": compressed(group={"targets": [f"re:{BOMB}"]}),
    "target is broken": compressed(group={"targets": ["re:("]}),
    "ignored pattern": compressed(ignore=["re:(x+x+)+y"]),
    "ignored numbers": compressed(ignore=[1]),
    "ignored patterns by the thousand": compressed(ignore=[f"re:.*a.*b.*{i}.*" for i in range(30_000)]),
    "plain files": compressed(),
    "unknown format": compressed(format="evil"),
    "the name of our packed weights": {"quant_method": "deepseek_v3_packed", "weights": {}},
}
PLAIN_FILES = {
    "fp8": FP8 | {"weight_block_size": [2**62, 2**62]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantization_of_a_stranger_is_refused(name: str, folder) -> None:
    edit(folder / "config.json", quantization_config=QUANTIZATIONS[name])
    for read in (load(folder), lambda: Source(folder)):
        outcome = limited(read)
        assert_refused(outcome)
        assert "quantization" in outcome.message or "tensors" in outcome.message, str(outcome)


@pytest.mark.parametrize("name", ["fp8", "bitsandbytes"])
def test_quantization_of_files_without_quantized_weights_is_cheap(name: str, folder) -> None:
    """The files decide: these hold plain weights, which load."""
    edit(folder / "config.json", quantization_config=PLAIN_FILES[name])
    outcome = limited(load(folder))
    assert outcome.loaded, str(outcome)
    assert_cheap(outcome)


def test_a_quantized_checkpoint_that_names_no_dtype_loads_or_is_refused(checkpoint, tmp_path) -> None:
    export(checkpoint, tmp_path / "int8", "int8", progress=False)
    content = json.loads((tmp_path / "int8" / "config.json").read_text())
    del content["dtype"]
    (tmp_path / "int8" / "config.json").write_text(json.dumps(content))
    outcome = limited(load(tmp_path / "int8"))
    assert outcome.loaded or "ValueError" in outcome.classes, str(outcome)


# --- patterns ------------------------------------------------------------------------------------------------------

PATTERNS = {
    "(a+)+$": "a repeated group",
    "(a|a)*b": "a repeated group",
    "(.*)*x": "a repeated group",
    "(?:.+){5}": "a repeated group",
    "((a?){30}){30}": "a repeated group",
    ".*.*.*.*.*x": "5 repeats",
    "a?" * 30 + "a" * 30: "30 repeats",
    "(?x) (a) *": "'(?x', allowed are",
    "(?i)(a) *": "'(?i', allowed are",
    "(?#)a": "'(?#', allowed are",
    "(": "not a regular expression",
    "[" * 50: "not a regular expression",
    "(" * 400 + ")" * 400: None,
    "a" * 1001 + "$": "1002 characters",
    r"[)]+.*": None,
    r"\)+": None,
    r"[^]a]*": None,
    r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj": None,
    r"layers\.\d+\.(self_attn\.q_proj|mlp\.gate\.weight)": None,
    r"(?:.*self_attn)?.*kv_b_proj$": None,
    "model.layers.0.self_attn.q_proj": None,
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern[:30])
def test_patterns(pattern: str) -> None:
    expected, found = PATTERNS[pattern], pattern_problem(pattern)
    assert found is None if expected is None else expected in str(found)


# --- weights -------------------------------------------------------------------------------------------------------


def test_weights_beyond_the_folder_are_refused(folder) -> None:
    (folder / SINGLE).rename(folder.parent / "secret.safetensors")
    names = list(load_file(folder.parent / "secret.safetensors"))
    for target in ("../secret.safetensors", str(folder.parent / "secret.safetensors")):
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))
        for read in (load(folder), lambda: Source(folder)):
            assert_refused(limited(read), folder / INDEX, "weight_map[", "leaves the model folder")
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "link.safetensors")}))
    assert_refused(limited(load(folder)), folder / INDEX, "leaves the model folder")


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", SINGLE])
def test_pickles_do_not_run(name: str, folder) -> None:
    (folder / SINGLE).unlink()
    torch.save({"lm_head.weight": Runs(f"touch {folder}/ran")}, folder / name)
    for read in (load(folder), lambda: Source(folder)):
        assert_refused(limited(read), folder, "safetensors")
    assert not (folder / "ran").exists()


def test_headers_and_indexes_of_the_largest_checkpoints_are_allowed() -> None:
    """All tensors of the 671B model in one file, in NF4: six tensors for each linear layer, the most of any format."""
    config = DeepseekV3Config()
    linears = linear_shapes(config, mtp=True)
    names = [name for name in tensor_shapes(config, mtp=True) if name.removesuffix(".weight") not in linears]
    parts = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", ".quant_state.bitsandbytes__nf4")
    names += [f"{layer}.weight{part}" for layer in linears for part in parts]
    entry = {"dtype": "BF16", "shape": [7168, 2048], "data_offsets": [10**12, 10**12 + 2**25]}
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-000163.safetensors")}
    for text in (json.dumps(dict.fromkeys(names, entry)), json.dumps(index, indent=2)):
        assert len(text) < 0.8 * MAX_JSON_BYTES and sum(map(text.count, "[{:,")) < 0.8 * MAX_ITEMS


SMALL_OBJECTS = b'{"a": [' + b"[]," * 5_000_000 + b"[]]}"


def test_a_header_of_many_small_objects_is_refused(folder) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(SMALL_OBJECTS)) + SMALL_OBJECTS)
    assert_refused(limited(load(folder)), folder / SINGLE)


def test_an_index_of_many_small_objects_is_refused(folder) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_bytes(SMALL_OBJECTS)
    assert_refused(limited(load(folder)), folder / INDEX)


@pytest.mark.parametrize("metadata", [True, [], {"format": 1}, {"format": None}], ids=str)
def test_a_header_with_other_metadata_is_refused(metadata, folder) -> None:
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": metadata}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    assert_refused(limited(load(folder)), folder / SINGLE, "__metadata__")


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": []}], ids=str)
def test_an_index_with_other_metadata_loads_or_is_refused(metadata: dict, folder) -> None:
    names = list(load_file(folder / SINGLE))
    (folder / SINGLE).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({**metadata, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    outcome = limited(load(folder))
    assert outcome.loaded or (folder / INDEX).name in outcome.message and "ValueError" in outcome.classes, str(outcome)


def test_a_file_of_tiny_tensors_is_read_within_the_limits(folder) -> None:
    """Names are what a header costs: 25,000, of the 91,991 that the 671B model has in 163 files."""
    entry = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    entries = {f"model.layers.9.x{i}": {**entry, "data_offsets": [i, i + 1]} for i in range(25_000)}
    header = json.dumps(entries).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"0" * len(entries))
    assert_refused(limited(load(folder)), folder, "25000 unexpected")


def test_weights_that_are_not_finite_can_be_found(folder) -> None:
    assert find_nonfinite(str(folder)) == []
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / SINGLE)
    assert find_nonfinite(folder) == ["model.norm.weight"]
    codes = torch.tensor([0, 0x7F], dtype=torch.uint8)  # NaN in both of FP8's types
    tensors |= {"a": codes.clone().view(torch.float8_e4m3fn), "b": codes.clone().view(torch.float8_e5m2), "c": codes}
    tensors["lm_head.weight"] = torch.full((2, 2), -torch.inf, dtype=torch.bfloat16)
    save_file(tensors, folder / SINGLE)
    assert sorted(find_nonfinite(folder)) == ["a", "b", "lm_head.weight", "model.norm.weight"]


# --- files beside them ---------------------------------------------------------------------------------------------

GENERATION = {
    "a list": ("[]", "object"),
    "nested": ("[" * 100_000, "nested"),
    "self": ('{"self": 1}', "self"),
    "a field of another type": ('{"watermarking_config": {"x": 1}}', "watermarking_config"),
    "a method": ('{"validate": 1}', "validate"),
    "a class": ('{"compile_config": {"x": 1}}', "compile_config"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_configuration_is_refused_by_name(name: str, folder) -> None:
    text, message = GENERATION[name]
    (folder / "generation_config.json").write_text(text)
    assert_refused(limited(load(folder)), folder / "generation_config.json", message)


def test_an_adapter_beside_the_model_does_not_unpickle(folder, adapter) -> None:
    """PEFT's files in a model's folder make transformers load them, too."""
    shutil.copy(adapter / "adapter_config.json", folder)
    torch.save({"a": Runs(f"touch {folder}/ran")}, folder / "adapter_model.bin")
    outcome = limited(load(folder))
    assert not outcome.loaded and not (folder / "ran").exists(), str(outcome)
    assert_cheap(outcome)


def test_the_configuration_alone_is_as_cheap(folder) -> None:
    edit(folder / "config.json", quantization_config=compressed(ignore=["re:(x+x+)+y"]))
    assert_refused(limited(lambda: AutoConfig.from_pretrained(folder)), "quantization_config['ignore']: found 're:(x")
    edit(folder / "config.json", quantization_config=compressed(ignore=[f"model.layers.{i}" for i in range(60_000)]))
    assert_cheap(limited(lambda: DeepseekV3Config.from_pretrained(folder)))
