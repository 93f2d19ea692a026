"""DeepSeek's FP8 files against an implementation with loops, and read back by stock transformers and by us."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from deepseek_v3.export import Source, export, fp8
from deepseek_v3.export.files import plan_safetensors
from deepseek_v3.modeling_deepseek_v3.checkpoint import mtp_copies, tensor_shapes
from tests.export.helpers import config_json, read_tensors
from tests.modeling_deepseek_v3.helpers import build, relative_error, run_python, tiny_config, tokens

QUANTIZED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As the README of the official weights has it, block by block, in fp64."""
    result = torch.zeros(codes.shape, dtype=torch.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            result[part] = codes[part].double() * scale[i, j].double()
    return result


@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks_hold_the_weights(ragged: Path, tmp_path: Path, power_of_two: bool) -> None:
    export(ragged, tmp_path, "fp8", power_of_two=power_of_two)
    before, after = read_tensors(ragged), read_tensors(tmp_path)
    quantized = {name.removesuffix("_scale_inv") for name in after if name.endswith("_scale_inv")}
    assert quantized == {name for name in before if name.endswith(tuple(f".{q}.weight" for q in QUANTIZED))}
    assert "model.layers.3.mlp.experts.7.down_proj.weight" in quantized  # of the MTP layer
    assert after.keys() == before.keys() | {f"{name}_scale_inv" for name in quantized}
    for name, weight in before.items():
        if name not in quantized:
            wanted = torch.float32 if name.endswith("bias") else torch.bfloat16
            assert after[name].dtype == wanted and torch.equal(after[name], weight), name
            continue
        codes, scale = after[name], after[f"{name}_scale_inv"]
        assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        assert scale.shape == (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
        for i in range(scale.shape[0]):  # the largest weight of a block has the largest code, 448
            for j in range(scale.shape[1]):
                part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                largest = codes[part].float().abs().max()
                assert 224 <= largest <= 448 and (power_of_two or largest == 448)
        if power_of_two:
            assert (scale.frexp().mantissa == 0.5).all()
        error = (dequantize(codes, scale) - weight.double()).abs()
        spacing = torch.maximum(weight.double().abs() * 2**-4, scale.max().double() * 2**-10)
        assert (error <= spacing * 1.001).all(), name


def test_the_configuration_is_the_official_one(ragged: Path, tmp_path: Path) -> None:
    official = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    export(ragged, tmp_path / "a", "fp8")
    export(ragged, tmp_path / "b", "fp8", power_of_two=True)
    assert config_json(tmp_path / "a")["quantization_config"] == official
    assert config_json(tmp_path / "b")["quantization_config"] == {**official, "scale_fmt": "ue8m0"}
    assert config_json(tmp_path / "a")["dtype"] == "bfloat16"


def test_it_is_read_back_as_the_naive_implementation_reads_it(ragged: Path, tmp_path: Path) -> None:
    export(ragged, tmp_path, "fp8")
    source, stored = Source(tmp_path), read_tensors(tmp_path)
    assert source.names == Source(ragged).names
    for name in source.names:
        scale = stored.get(f"{name}_scale_inv")
        expected = stored[name] if scale is None else dequantize(stored[name], scale).float().bfloat16()
        assert source.dtype(name) == expected.dtype and source.shape(name) == expected.shape
        assert torch.equal(source.read(name), expected), name


def test_fp8_becomes_bf16_and_fp8_again_without_a_change(ragged: Path, tmp_path: Path) -> None:
    export(ragged, tmp_path / "fp8", "fp8", power_of_two=True)
    export(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    export(tmp_path / "bf16", tmp_path / "again", "fp8", power_of_two=True)
    first, second = read_tensors(tmp_path / "fp8"), read_tensors(tmp_path / "again")
    for name in first:
        if not name.endswith("_scale_inv"):
            a, b = (dequantize(t[name], t[f"{name}_scale_inv"]) if f"{name}_scale_inv" in t else t[name]
                    for t in (first, second))  # fmt: skip
            assert torch.equal(a, b), name


@torch.no_grad()
def test_our_from_pretrained_reads_it_on_a_cpu(ragged: Path, tmp_path: Path) -> None:
    export(ragged, tmp_path / "fp8", "fp8")
    export(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    model, plain = (DeepseekV3ForCausalLM.from_pretrained(tmp_path / f, dtype=torch.float32) for f in ("fp8", "bf16"))
    original = DeepseekV3ForCausalLM.from_pretrained(ragged, dtype=torch.float32)
    ids = tokens(2, 20)
    logits, expected = (m.eval()(ids).logits for m in (model, plain))
    assert relative_error(logits, expected) < 2e-2  # ours may skip the rounding of a dequantized weight to bf16
    assert 1e-3 < relative_error(expected, original.eval()(ids).logits) < 0.5


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
logits = []
for folder in sys.argv[1:3]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    assert type(model).__module__.startswith("transformers.models.deepseek_v3"), type(model)
    ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    logits.append(model(ids).logits)
assert not any(name.startswith("deepseek_v3") for name in sys.modules)
print((logits[0] - logits[1]).abs().max().item() / logits[1].abs().max().item())
"""


def test_stock_transformers_reads_whole_blocks(tmp_path: Path) -> None:
    """Where no block is cut, which is all that it can read on a CPU."""
    whole = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128}
    whole |= {"kv_lora_rank": 128, "qk_rope_head_dim": 128, "qk_nope_head_dim": 64, "v_head_dim": 64}
    whole |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_nextn_predict_layers": 0}
    model = build(tiny_config(**whole)).bfloat16()
    assert all(size % 128 == 0 for name, p in model.named_parameters() if "_proj" in name for size in p.shape[-2:])
    model.save_pretrained(tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "fp8", "fp8")
    export(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    assert float(run_python(STOCK, str(tmp_path / "fp8"), str(tmp_path / "bf16")).split()[-1]) == 0


def test_the_report_counts_what_is_quantized(ragged: Path, tmp_path: Path) -> None:
    report = export(ragged, tmp_path, "fp8")
    tensors = read_tensors(tmp_path)
    codes = [t for t in tensors.values() if t.dtype == torch.float8_e4m3fn]
    scales = [t for name, t in tensors.items() if name.endswith("_scale_inv")]
    elements = sum(t.numel() for t in codes)
    quantized = report["quantized"]
    assert quantized["parameters"] == elements and quantized["bytes_in_bf16"] == 2 * elements
    assert quantized["bytes"] == elements + sum(t.nbytes for t in scales)
    assert quantized["share"] == elements / report["parameters"] > 0.9
    assert report["tensors"]["quantized"] == len(codes)


def test_a_scale_that_does_not_fit_is_named(ragged: Path, tmp_path: Path) -> None:
    export(ragged, tmp_path, "fp8")
    tensors = read_tensors(tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    save_file({**tensors, name: tensors[name][:1]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: .*o_proj.weight_scale_inv is F32 \[1, 1\]"):
        Source(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj.*weight_scale_inv"):
        Source(tmp_path)


def test_options_are_checked(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="power_of_two: found 'yes', allowed are True and False"):
        export(plain, tmp_path, "fp8", power_of_two="yes")


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    model = build(tiny_config())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", "fp8")
    assert not Source(tmp_path / "out").read("model.layers.0.mlp.up_proj.weight").any()


def test_the_published_model_would_have_the_published_size() -> None:
    """DeepSeek-V3's weight files on the Hub have 688,586,727,753 bytes; headers differ by a few KB."""
    config = DeepseekV3Config()
    shapes = tensor_shapes(config, mtp=True)
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    source = SimpleNamespace(names=list(shapes), shape=shapes.__getitem__, copies=mtp_copies(config))
    files = plan_safetensors(fp8.steps(source, fp8.Options()), 5 * 2**30)
    assert abs(sum(file.n_bytes for file in files) - 688_586_727_753) < 2e4
