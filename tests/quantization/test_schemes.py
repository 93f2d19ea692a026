"""Quantized checkpoints that must be refused: by file and tensor, or by field, with what is allowed."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Model
from deepseek_v3.quantization import PackedWeight, packed_config
from tests.quantization import stored

OUT = "model.layers.0.self_attn.o_proj"
UP = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    return {name: stored.write(tmp_path_factory.mktemp(name), name)[0] for name in stored.FORMATS}


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """Copies a checkpoint with other tensors or another configuration."""

    def damage(name: str, tensors=None, quantization=None) -> Path:
        state = load_file(checkpoints[name] / "model.safetensors")
        if tensors is not None:
            tensors(state)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
        config = json.loads((checkpoints[name] / "config.json").read_text())
        if quantization is not None:
            quantization(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return damage


def refused(folder: Path, message: str, where: str | None = None) -> None:
    for cls in (DeepseekV3ForCausalLM, DeepseekV3Model):
        for dequantize in (True, False):
            start = time.monotonic()
            with pytest.raises(ValueError, match=message) as caught:
                cls.from_pretrained(folder, quantization_config=packed_config(dequantize=dequantize))
            assert where is None or str(folder / where) in str(caught.value)
            assert len(str(caught.value)) < 2000 and time.monotonic() - start < 5


def drop(suffix: str):
    return lambda state: state.pop(suffix)


def put(name: str, change):
    return lambda state: state.update({name: change(state.get(name))})


TENSORS: dict[str, tuple[str, Any, str]] = {
    "fp8 without scales": ("fp8", drop(f"{OUT}.weight_scale_inv"), f"{OUT}.weight is F8_E4M3 without"),
    "fp8 without codes": ("fp8", drop(f"{OUT}.weight"), f"1 missing: {OUT}.weight$"),
    "fp8 scales of fp64": ("fp8", put(f"{OUT}.weight_scale_inv", lambda t: t.double()), "scale_inv is F64"),
    "fp8 scales of another grid": (
        "fp8",
        put(f"{UP}.weight_scale_inv", lambda t: t[:, :1]),
        rf"1 of another shape: {UP}.weight_scale_inv is \[1, 1\] in model.safetensors, .* needs \[1, 2\]",
    ),
    "fp8 in the embedding": (
        "fp8",
        put("model.embed_tokens.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "1 of another type: model.embed_tokens.weight is F8_E4M3 in .* needs BF16 or F16 or F32",
    ),
    "fp8 with scales of nothing": ("fp8", put("lm_head.weight_scale_inv", lambda _: torch.ones(1, 2)), "1 unexpected"),
    "int4 without scales": ("int4", drop(f"{OUT}.weight_scale"), f"{OUT}, which 'ignore' .* no {OUT}.weight_scale"),
    "int4 without words": ("int4", drop(f"{UP}.weight_packed"), f"there is no {UP}.weight_packed"),
    "int4 without a shape": ("int4", drop(f"{OUT}.weight_shape"), f"1 missing: {OUT}.weight_shape"),
    "int4 of int64": ("int4", put(f"{OUT}.weight_packed", lambda t: t.long()), "weight_packed is I64 .* needs I32"),
    "int4 of another size": (
        "int4",
        put(f"{OUT}.weight_packed", lambda t: t[:-1]),
        r"weight_packed is \[159, 16\] in",
    ),
    "int4 scales of another group": (
        "int4",
        put(f"{OUT}.weight_scale", lambda t: t[:, :1]),
        rf"{OUT}.weight_scale is \[160, 1\] in .*, the configuration needs \[160, 4\]",
    ),
    "int4 scales of int": ("int4", put(f"{OUT}.weight_scale", lambda t: t.to(torch.int8)), "weight_scale is I8, al"),
    "int4 of another shape": (
        "int4",
        put(f"{UP}.weight_shape", lambda t: t + 8),
        rf"{UP}: weight_shape holds \[104, 168\], the configuration needs \[96, 160\]",
    ),
    "int4 with zero points": (
        "int4",
        put(f"{OUT}.weight_zero_point", lambda _: torch.zeros(20, 4, dtype=torch.int32)),
        f"found {OUT}.weight_zero_point, allowed are symmetric",
    ),
    "int4 with an order": ("int4", put(f"{OUT}.weight_g_idx", lambda _: torch.zeros(128)), f"1 unexpected: {OUT}"),
    "int4 of what is ignored": (
        "int4-experts",
        lambda state: state.update({f"{OUT}.weight_packed": torch.zeros(160, 16, dtype=torch.int32)}),
        f"found {OUT}.weight_packed, which quantization_config quantizes with no group, or names in 'ignore'",
    ),
    "int8 where plain is meant": (
        "int8-experts",
        put(f"{OUT}.weight", lambda t: t.to(torch.int8)),
        f"1 of another type: {OUT}.weight is I8 in .* needs BF16",
    ),
    "int8 that is plain": (
        "int8",
        put(f"{OUT}.weight", lambda t: t.bfloat16()),
        f"{OUT}.weight is BF16 in .* needs I8",
    ),
    "int8 scales of another shape": ("int8", put(f"{UP}.weight_scale", lambda t: t[:, 0]), r"weight_scale is \[96\]"),
    "int8 without scales": ("int8", drop(f"{UP}.weight_scale"), f"there is no {UP}.weight_scale"),
    "nf4 without scales": ("nf4", drop(f"{OUT}.weight.absmax"), r"6? .*missing|unexpected"),
    "nf4 without codes of codes": ("nf4", drop(f"{OUT}.weight.nested_quant_map"), "1 missing: .*nested_quant_map"),
    "nf4 without its record": ("nf4", drop(f"{UP}.weight.quant_state.bitsandbytes__nf4"), "1 missing: .*quant_state"),
    "nf4 of other codes": (
        "nf4",
        put(f"{UP}.weight.quant_map", lambda t: t.flip(0)),
        f"{UP}: weight.quant_map holds other values than bitsandbytes",
    ),
    "nf4 of other scales": (
        "nf4",
        put(f"{OUT}.weight.nested_quant_map", lambda t: t.flip(0)),
        f"{OUT}: weight.nested_quant_map holds other values",
    ),
    "nf4 of another shape": ("nf4", put(f"{OUT}.weight", lambda t: t.view(-1, 2)), rf"{OUT}.weight is \[\d+, 2\]"),
    "nf4 that is not double": ("nf4-single", put(f"{OUT}.weight.absmax", lambda t: t.byte()), "absmax is U8 .* F32"),
    "llm.int8 of another type": ("bnb-int8", put(f"{OUT}.weight", lambda t: t.float()), "weight is F32 .* needs I8"),
    "llm.int8 by columns": (
        "bnb-int8",
        put(f"{OUT}.weight_format", lambda t: t + 1),
        f"{OUT}: weight_format is 1, allowed is 0",
    ),
    "llm.int8 without scales": ("bnb-int8", drop(f"{UP}.SCB"), "missing|unexpected|another type"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(case: str, damaged) -> None:
    name, change, message = TENSORS[case]
    refused(damaged(name, tensors=change), message)


RECORD = b'{"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 256, "nested_dtype": "float32", "shape": %s}'


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xff\xfe",
        b"[" * 4000,
        b"[1]",
        b"{}",
        b'{"quant_type": "fp4"}',
        RECORD % b"[160, 128]",
        RECORD % b'[160, 128], "nested_offset": NaN',
        RECORD % b'[128, 160], "nested_offset": 1.0',
    ],
)
def test_broken_records_of_bitsandbytes_are_refused(record: bytes, damaged) -> None:
    tensor = torch.tensor(list(record), dtype=torch.uint8)
    change = put(f"{OUT}.weight.quant_state.bitsandbytes__nf4", lambda _: tensor)
    message = f"{OUT}: weight.quant_state.bitsandbytes__nf4.* allowed is"
    refused(damaged("nf4", tensors=change), message, "model.safetensors")


def test_an_endless_record_of_bitsandbytes_is_refused(damaged) -> None:
    change = put(f"{OUT}.weight.quant_state.bitsandbytes__nf4", lambda _: torch.zeros(100_000, dtype=torch.uint8))
    refused(damaged("nf4", tensors=change), "quant_state.bitsandbytes__nf4 has 100000 bytes, allowed", "config.json")


def field(*path: str, value: Any):
    def change(quantization: dict) -> None:
        for name in path[:-1]:
            quantization = quantization[name]
        quantization[path[-1]] = value

    return change


GROUP = ("config_groups", "group_0")
WEIGHTS = (*GROUP, "weights")
FIELDS: dict[str, tuple[str, Any, str]] = {
    "another method": ("int4", field("quant_method", value="gptq"), "quant_method is 'gptq', allowed are fp8, compr"),
    "e5m2": ("fp8", field("fmt", value="e5m2"), "quantization_config.fmt is 'e5m2', allowed are 'e4m3'"),
    "static fp8": ("fp8", field("activation_scheme", value="static"), "activation_scheme is 'static'"),
    "block of true": ("fp8", field("weight_block_size", value=[True, 128]), "weight_block_size"),
    "not compressed": ("int4", field("quantization_status", value="frozen"), "quantization_status is 'frozen'"),
    "another format": ("int4", field("format", value="marlin-24"), "format is 'marlin-24', allowed are"),
    "8 bits in words": ("int8", field("format", value="pack-quantized"), "num_bits is 8, whose format is 'int-quan"),
    "words of a group": ("int8", field(*GROUP, "format", value="pack-quantized"), "group_0.format is 'pack-qu"),
    "no groups": ("int4", field("config_groups", value={}), r"config_groups is \{\}"),
    "groups of text": ("int4", field(*GROUP, value="W4A16"), "group_0 is 'W4A16', allowed is an object"),
    "no weights": ("int4", field(*WEIGHTS, value=None), "group_0.weights is None"),
    "float": ("int4", field(*WEIGHTS, "type", value="float"), "weights.type is 'float', allowed are 'int'"),
    "3 bits": ("int4", field(*WEIGHTS, "num_bits", value=3), "weights.num_bits is 3, allowed are 4 and 8"),
    "bits of text": ("int4", field(*WEIGHTS, "num_bits", value="4"), "num_bits is '4'"),
    "asymmetric": ("int4", field(*WEIGHTS, "symmetric", value=False), "weights.symmetric is False, allowed are True"),
    "per tensor": ("int8", field(*WEIGHTS, "strategy", value="tensor"), "strategy is 'tensor', allowed are 'channel'"),
    "channels of 4 bits": ("int4", field(*WEIGHTS, "strategy", value="channel"), "strategy is 'channel', allowed"),
    "group of 48": ("int4", field(*WEIGHTS, "group_size", value=48), "group_size is 48, allowed are 32 and 64"),
    "no group size": ("int4", field(*WEIGHTS, "group_size", value=None), "group_size is None, allowed are 32"),
    "group too large": ("int4", field(*WEIGHTS, "group_size", value=256), "group_size is 256, no divisor of the"),
    "reordered": ("int4", field(*WEIGHTS, "actorder", value="group"), "actorder is 'group', allowed are None"),
    "W4A8": ("int4", field(*GROUP, "input_activations", value={"num_bits": 8}), "input_activations is"),
    "static activations": (
        "int8",
        field(*GROUP, "input_activations", "dynamic", value=False),
        "input_activations.dynamic is False, allowed are True",
    ),
    "activations of text": ("int8", field(*GROUP, "input_activations", value="int8"), "input_activations is 'int8'"),
    "outputs": ("int8", field(*GROUP, "output_activations", value={"num_bits": 8}), "output_activations is"),
    "kv cache": ("int4", field("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme is"),
    "sparsity": ("int4", field("sparsity_config", value={"format": "dense"}), "sparsity_config is"),
    "rotations": ("int4", field("transform_config", value={"config_groups": {"a": {}}}), "transform_config is"),
    "targets of text": ("int4", field(*GROUP, "targets", value="Linear"), "group_0.targets is 'Linear', allowed is a"),
    "no targets": ("int4", field(*GROUP, "targets", value=["Conv1d"]), "found model.* quantizes with no group"),
    "ignore of text": ("int4", field("ignore", value="lm_head"), "ignore is 'lm_head', allowed is a list"),
    "ignore of numbers": ("int4", field("ignore", value=[3]), r"ignore is \[3\], allowed is a list"),
    "ignore of too little": (
        "int8-experts",
        field("ignore", value=["lm_head", "re:.*eh_proj"]),
        "config_groups.group_0 quantizes .*, which 'ignore' does not name, but there is no .*weight_scale",
    ),
    "ignore of too much": ("int4", field("ignore", value=["re:.*"]), "weight_packed, which quantization_config"),
    "no expression": ("int4", field("ignore", value=["re:("]), r"ignore.*: found .*re:\(.*regular expression"),
    "slow expression": ("int4", field("ignore", value=["re:(a+)+$"]), r"ignore.*: found .*re:.* repeated group"),
    "fp4": ("nf4", field("bnb_4bit_quant_type", value="fp4"), "bnb_4bit_quant_type is 'fp4', allowed are 'nf4'"),
    "no 4-bit type": ("nf4", lambda q: q.pop("bnb_4bit_quant_type"), "bnb_4bit_quant_type is None"),
    "bf16 storage": ("nf4", field("bnb_4bit_quant_storage", value="bfloat16"), "bnb_4bit_quant_storage is 'bfloat16'"),
    "both": ("nf4", field("load_in_8bit", value=True), "load_in_4bit is True and load_in_8bit is True"),
    "neither": ("nf4", field("load_in_4bit", value=False), "allowed is True for one of them"),
    "training weights": ("bnb-int8", field("llm_int8_has_fp16_weight", value=True), "has_fp16_weight is True"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_configurations_that_are_not_read_are_refused(case: str, damaged) -> None:
    name, change, message = FIELDS[case]
    refused(damaged(name, quantization=change), message)


def test_a_quantization_that_is_no_object_is_refused(checkpoints, damaged) -> None:
    folder = damaged("int4")
    config = json.loads((folder / "config.json").read_text())
    for value in ([], "int4", 4):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
        with pytest.raises(ValueError, match="quantization_config"):
            DeepseekV3ForCausalLM.from_pretrained(folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing: .* unexpected: "):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def test_experts_of_a_layer_have_to_be_quantized_alike(checkpoints, damaged) -> None:
    """One expert's matrix is left plain; a model of plain weights can be made of it all the same."""

    def dequantize(state: stored.Tensors) -> None:
        codes, scale = state.pop(f"{UP}.weight"), state.pop(f"{UP}.weight_scale")
        state[f"{UP}.weight"] = codes * scale

    folder = damaged("int8", tensors=dequantize, quantization=lambda q: q["ignore"].append(UP))
    with pytest.raises(ValueError, match=f"{UP} are quantized in different ways, allowed is one"):
        DeepseekV3ForCausalLM.from_pretrained(folder)
    DeepseekV3ForCausalLM.from_pretrained(folder, quantization_config=packed_config(dequantize=True))


def test_groups_targets_and_patterns(checkpoints, damaged) -> None:
    """A name outranks a pattern, and a pattern the class; `ignore` outranks all."""

    def change(quantization: dict) -> None:
        other = copy.deepcopy(quantization["config_groups"]["group_0"])
        other["input_activations"], other["targets"] = None, ["re:.*experts", "model.layers.0.self_attn.o_proj"]
        quantization["config_groups"]["group_1"] = other

    model = DeepseekV3ForCausalLM.from_pretrained(damaged("int8", quantization=change))
    dynamic = {
        name.removesuffix(".weight"): weight.layout.dynamic
        for name, weight in model.named_modules()
        if isinstance(weight, PackedWeight)
    }
    layers = [name for name, value in dynamic.items() if not value]
    assert f"{OUT}" in layers and "model.layers.1.mlp.experts.gate_up_proj" in layers
    assert "model.layers.1.mlp.shared_experts.up_proj" in layers and dynamic["model.layers.0.self_attn.q_a_proj"]


def test_down_projections_may_be_plain_beside_packed_ones(damaged) -> None:
    def change(state: stored.Tensors) -> None:
        for name in [name for name in state if ".experts." in name and name.endswith("down_proj.weight_scale")]:
            weight = name.removesuffix("_scale")
            state[weight] = state[weight] * state.pop(name)

    folder = damaged("int8", tensors=change, quantization=lambda q: q["ignore"].append("re:.*\\.experts.*down_proj"))
    model, plain = (
        DeepseekV3ForCausalLM.from_pretrained(folder, quantization_config=packed_config(dequantize=dequantize))
        for dequantize in (False, True)
    )
    inputs = torch.arange(3, 10)[None]
    with torch.no_grad():
        found, expected = model(inputs).logits.float(), plain(inputs).logits.float()
    assert (found - expected).norm() / expected.norm() < 0.06
    model.save_pretrained(folder / "again")
    assert stored.tensors_of(folder / "again").keys() == stored.tensors_of(folder).keys()
