"""NF4 files against bitsandbytes' own functions, read back by us and, in part, by stock transformers."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import deepseek_v3.quantization
from deepseek_v3 import DeepseekV3ForSequenceClassification
from deepseek_v3.export import Source, export, nf4
from deepseek_v3.finetuning.lora import apply_lora
from deepseek_v3.quantization import PackedWeight, bytes_per_parameter
from tests.export.helpers import config_json, read_tensors, write_checkpoint
from tests.modeling_deepseek_v3.helpers import relative_error, run_python, tokens
from tests.quantization.test_loading import official

# one dense, one MoE and one MTP layer; all widths are multiples of 64: bitsandbytes' products on CPUs need that
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64}
SIZES |= {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
RECORD = "quant_state.bitsandbytes__nf4"
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), torch.bfloat16, **SIZES)


def targeted(name: str, targets: str) -> bool:
    """MTP layers too, but eh_proj in them."""
    linear = name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in name
    return linear and (targets == "linears" or ".experts." in name)


def parts_of(written: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """What is stored with a weight, by the names that bitsandbytes gives it; taken out of `written`."""
    names = [key for key in written if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}."): written.pop(key) for key in names}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("targets", ["linears", "experts"])
def test_files_hold_what_bitsandbytes_makes(ragged: Path, tmp_path: Path, double: bool, targets: str) -> None:
    report = export(ragged, tmp_path / "out", "nf4", progress=False, double_quant=double, targets=targets)
    original, written = read_tensors(ragged), read_tensors(tmp_path / "out")
    quantized = 0
    for name, weight in original.items():
        found = written.pop(name)
        if not targeted(name, targets):
            assert found.dtype == weight.dtype and torch.equal(found, weight), name
            continue
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
        assert torch.equal(found, packed)
        parts, expected = parts_of(written, name), state.as_dict(packed=True)
        records = [bytes(each.pop(RECORD).tolist()) for each in (parts, expected)]
        assert json.loads(records[0]) == json.loads(records[1]) and len(records[0]) == 192
        assert parts.keys() == expected.keys() and len(parts) == (4 if double else 2)
        assert all(parts[key].dtype == part.dtype and torch.equal(parts[key], part) for key, part in expected.items())
        elements, scales = weight.numel(), math.ceil(weight.numel() / 64)
        nested = 4 * math.ceil(scales / 256) + 4 * 256
        quantized += math.ceil(elements / 2) + (scales + nested if double else 4 * scales) + 4 * 16 + 192
    assert not written
    assert report["quantized"]["bytes"] == quantized
    count = sum(weight.numel() for name, weight in original.items() if targeted(name, targets))
    assert report["quantized"]["parameters"] == count


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_reads_the_weights_that_we_read(ragged: Path, tmp_path: Path, double: bool) -> None:
    export(ragged, tmp_path / "out", "nf4", progress=False, double_quant=double)
    original, written, source = read_tensors(ragged), read_tensors(tmp_path / "out"), Source(tmp_path / "out")
    assert source.names == Source(ragged).names
    for name in source.names:
        packed, parts = written.pop(name), parts_of(written, name)
        assert source.dtype(name) == (torch.bfloat16 if parts else packed.dtype)
        if not parts:
            continue
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        shape, state.shape = state.shape, torch.Size((state.shape.numel(),))  # its blocks run on from row to row
        weight = functional.dequantize_4bit(packed, state).view(shape)
        assert weight.dtype == torch.bfloat16 and torch.equal(source.read(name), weight), name
        assert 0.03 < (weight - original[name]).float().norm() / original[name].float().norm() < 0.15


def test_config(whole: Path, tmp_path: Path) -> None:
    export(whole, tmp_path / "a", "nf4", progress=False)
    config = config_json(tmp_path / "a")["quantization_config"]
    assert config == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "model.layers.2.eh_proj"],
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    assert BitsAndBytesConfig.from_dict(config).to_dict() == config
    export(whole, tmp_path / "b", "nf4", progress=False, targets="experts", double_quant=False)
    config = config_json(tmp_path / "b")["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is False
    plain = {name for name in read_tensors(whole) if targeted(name, "linears") and not targeted(name, "experts")}
    names = {"lm_head", "model.layers.2.eh_proj", *(name.removesuffix(".weight") for name in plain)}
    assert set(config["llm_int8_skip_modules"]) == names and "model.layers.2.self_attn.o_proj" in names


@pytest.mark.parametrize("format", ["nf4", "bnb-int8"])
def test_a_classifiers_head_is_skipped(tmp_path: Path, format: str) -> None:
    write_checkpoint(tmp_path / "plain", cls=DeepseekV3ForSequenceClassification)
    export(tmp_path / "plain", tmp_path / "out", format, progress=False)
    assert config_json(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"] == ["score"]
    model = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.score.weight, read_tensors(tmp_path / "plain")["score.weight"].bfloat16())


def check_use(plain: Path, folder: Path, tmp_path: Path, bytes_per_weight: float) -> None:
    """Load a folder packed, compute, save, and train an adapter on it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == 3 * 5 + 3 + 2 * 3 + 2 * 2  # attention, dense MLP, shared experts, routed experts
    original, stored = read_tensors(plain), read_tensors(folder)
    copies = ("2.embed_tokens.weight", "2.shared_head.head.weight")
    weights = sum(weight.numel() for name, weight in original.items() if targeted(name, "linears"))
    rest = sum(t.numel() for n, t in original.items() if not targeted(n, "linears") and not n.endswith(copies))
    expected = (bytes_per_weight * weights + 2 * rest) / (weights + rest)
    assert expected < bytes_per_parameter(model) < 1.05 * expected  # scales of small layers
    with torch.no_grad():  # bitsandbytes' own layers repack their weights in an evaluation on some CPUs
        model.eval()(tokens(2, 9))
        assert model.generate(tokens(2, 5), **GREEDY).shape == (2, 11)
    model.save_pretrained(tmp_path / "saved")
    saved = read_tensors(tmp_path / "saved")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    key = "quantization_config"
    assert config_json(tmp_path / "saved")[key] == config_json(folder)[key]

    source = Source(folder)
    for name, tensor in official(model).items():
        assert tensor.dtype == source.dtype(name) and torch.equal(tensor, source.read(name)), name

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = apply_lora(base, ["all"], rank=2).train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(input_ids=tokens(2, 12), labels=tokens(2, 12)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all("lora_" in name and p.grad.isfinite().all() and p.grad.any() for name, p in trained.items())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("double, bytes_per_weight", [(True, 0.5 + 1 / 64), (False, 0.5 + 4 / 64)])
def test_use(whole: Path, tmp_path: Path, double: bool, bytes_per_weight: float) -> None:
    export(whole, tmp_path / "out", "nf4", progress=False, double_quant=double)
    check_use(whole, tmp_path / "out", tmp_path, bytes_per_weight)


def test_zeros_and_smallest_weights(whole: Path, tmp_path: Path) -> None:
    """An expert that was never trained; offsets that are printed with an exponent."""
    tensors = read_tensors(whole)
    dead, small = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (1, 2))
    tensors[dead].zero_()
    tensors[small] *= 1e-9
    shutil.copytree(whole, tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    export(tmp_path / "plain", tmp_path / "out", "nf4", progress=False)
    source, written = Source(tmp_path / "out"), read_tensors(tmp_path / "out")
    assert not source.read(dead).any() and relative_error(source.read(small), tensors[small]) < 0.2
    assert b"e-" in bytes(written[f"{small}.{RECORD}"].tolist())


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.401298464324817e-45, 1.2345678806304932e-05, 123456789012345680.0])
def test_every_record_has_one_size(offset: float) -> None:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1234567, 1234567]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    padded = nf4._padded(functional.pack_dict_to_tensor(state))
    assert padded.shape == (192,) and functional.unpack_tensor_to_dict(padded) == state


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = (7 * torch.arange(2)[:, None] + 3 * torch.arange(24)) % 90 + 2
models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in sys.argv[1:3]]
assert not any(name.startswith("deepseek_v3") for name in sys.modules)
linears = sum(type(module).__name__ == sys.argv[4] for module in models[0].modules())
with torch.no_grad():
    found, expected = (model(ids).logits.float() for model in models)
error = ((found - expected).norm() / expected.norm()).item()
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.bfloat16)(ids)
    message = "none"
except RuntimeError as problem:
    message = str(problem)
print(linears, error, message)
"""


def stock_result(export: Path, mixed: Path, layer: str, plain_again: Path, bf16: tuple[str, ...]) -> list[str]:
    """Number of bitsandbytes' layers, error of the logits, and message, of stock transformers: it reads `mixed`, which
    is `export` with weights of certain names in bf16, and then `export`."""
    shutil.copytree(export, mixed)
    tensors, reference = read_tensors(export), read_tensors(plain_again)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in bf16)}
    replaced = {name: tensor for name, tensor in reference.items() if any(part in name for part in bf16)}
    save_file({**kept, **replaced}, mixed / "model.safetensors", {"format": "pt"})
    config = config_json(mixed)
    config["quantization_config"]["llm_int8_skip_modules"] += [part.strip(".") for part in bf16[1:]]
    (mixed / "config.json").write_text(json.dumps(config))
    output = run_python(STOCK, str(mixed), str(plain_again), str(export), layer, CUDA_VISIBLE_DEVICES="")
    return output.strip().splitlines()[-1].split(maxsplit=2)


def test_stock_transformers_reads_all_but_the_routed_experts(whole: Path, tmp_path: Path) -> None:
    """It stacks the experts' packed bytes, and stops at their shape."""
    export(whole, tmp_path / "nf4", "nf4", progress=False)
    export(tmp_path / "nf4", tmp_path / "bf16", "bf16", progress=False)
    linears, error, message = stock_result(
        tmp_path / "nf4", tmp_path / "mixed", "Linear4bit", tmp_path / "bf16", (".experts.",)
    )
    assert int(linears) == 2 * 5 + 3 + 3 and float(error) < 0.05
    assert "ignore_mismatched_sizes" in message


def test_errors(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="double_quant: found 1, allowed are True and False"):
        export(whole, tmp_path, "nf4", double_quant=1)
    with pytest.raises(ValueError, match="targets: found 'gate', allowed are experts, linears"):
        export(whole, tmp_path, "nf4", targets="gate")


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "deepseek_v3.quantization.bitsandbytes_layouts")
    monkeypatch.delattr(deepseek_v3.quantization, "bitsandbytes_layouts")
    for format in ("nf4", "bnb_int8"):
        monkeypatch.delitem(sys.modules, f"deepseek_v3.export.{format}")


@pytest.mark.parametrize("format", ["nf4", "bnb-int8"])
def test_without_bitsandbytes_it_says_what_to_install(
    whole: Path, tmp_path: Path, request: pytest.FixtureRequest, format: str
) -> None:
    export(whole, tmp_path / "there", format, progress=False)
    request.getfixturevalue("without_bitsandbytes")
    with pytest.raises(ValueError, match=f"format: {format} needs a library that is not installed: pip install b"):
        export(whole, tmp_path / "out", format)
    message = r"there.config\.json: quantization_config\.quant_method is 'bitsandbytes', which needs a library"
    with pytest.raises(ValueError, match=f"{message} that is not installed: pip install bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    with pytest.raises(ValueError, match=message):
        Source(tmp_path / "there")
