"""Models in NF4: the same by both ways of making them, equal to a plain model with the dequantized weights; and what
must not be quantized, kept in memory, rounded or written."""

import copy
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from deepseek_v3.modeling_deepseek_v3.layers import DeepseekV3Linear
from deepseek_v3.modeling_deepseek_v3.moe import DeepseekV3Experts
from deepseek_v3.quantization import (
    NF4Weight,
    bytes_per_parameter,
    dequantize_,
    nf4_config,
    quantize_nf4_,
    quantized_fraction,
)
from deepseek_v3.quantization import nf4 as nf4_module
from deepseek_v3.quantization.layers import NF4Linear
from tests.modeling_deepseek_v3.helpers import build, gradients, relative_error, tiny_config, tokens


def causal(**overrides) -> DeepseekV3ForCausalLM:
    kernels = {"attn_implementation": "sdpa", "experts_implementation": overrides.pop("experts", "deepseek_v3")}
    return build(tiny_config(**{"num_nextn_predict_layers": 1, **overrides}), **kernels)


def same_state(found: nn.Module, expected: nn.Module) -> None:
    first, second = found.state_dict(), expected.state_dict()
    assert set(first) == set(second)
    for name, tensor in second.items():
        assert first[name].dtype == tensor.dtype and torch.equal(first[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    causal().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"skip": ["kv_b_proj", "layers.1", "2.mlp"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_equals_quantizing_in_memory(saved: Path, dtype, options) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype, quantization_config=nf4_config(**options))
    made = quantize_nf4_(DeepseekV3ForCausalLM.from_pretrained(saved, dtype=dtype), **options)
    same_state(loaded, made)
    assert list(loaded.state_dict()) == list(made.state_dict())  # an adapter's names for the experts depend on it
    assert not loaded.training and not any(module.training for module in loaded.modules())
    for model in (loaded, made):
        assert model.is_loaded_in_4bit and model.is_quantized and model.config.quantization_config.quant_method
    inputs = tokens(2, 9)
    assert torch.equal(loaded(inputs).logits, made(inputs).logits)


def test_biases_and_tied_embeddings_are_loaded_as_they_are(tmp_path: Path) -> None:
    model = causal(attention_bias=True, tie_word_embeddings=True, q_lora_rank=None)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=nf4_config())
    same_state(loaded, quantize_nf4_(copy.deepcopy(model)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    bias = loaded.model.layers[0].self_attn.o_proj.bias
    assert torch.equal(bias, model.model.layers[0].self_attn.o_proj.bias)
    inputs = tokens(2, 7)
    with torch.no_grad():
        assert relative_error(loaded(inputs).logits, dequantize_(copy.deepcopy(loaded))(inputs).logits) <= 1e-5


def test_a_classifier_loads_without_its_head_quantized(saved: Path) -> None:
    torch.manual_seed(3)
    options = {"num_labels": 3, "dtype": torch.bfloat16}
    loaded = AutoModelForSequenceClassification.from_pretrained(saved, quantization_config=nf4_config(), **options)
    torch.manual_seed(3)
    made = quantize_nf4_(DeepseekV3ForSequenceClassification.from_pretrained(saved, **options))
    assert type(loaded.score) in (nn.Linear, DeepseekV3Linear) and loaded.score.weight.dtype == torch.bfloat16
    loaded.score, made.score = nn.Identity(), nn.Identity()  # drawn at random, in another order of layers
    same_state(loaded, made)


def test_an_fp8_checkpoint_loads_into_nf4(tmp_path: Path) -> None:
    model = causal(num_nextn_predict_layers=0).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and "experts." in name]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4_config())
    same_state(loaded, quantize_nf4_(DeepseekV3ForCausalLM.from_pretrained(tmp_path)))


def test_what_is_quantized_and_what_is_not(saved: Path) -> None:
    config = (saved / "config.json").read_bytes()
    plain = DeepseekV3ForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, quantization_config=nf4_config())
    quantized = [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8]
    names = {n.removesuffix(".packed") for n in quantized if "absmax" not in n and "quant_state" not in n}
    expected = {name for name in plain.state_dict() if "_proj" in name}  # of attention, MLPs, experts, and `eh_proj`
    assert len(expected) == 4 * 5 + 4 * 3 + 3 * 2 + 1 and names == expected
    for name, tensor in plain.state_dict().items():
        if name not in names:
            assert torch.equal(model.state_dict()[name], tensor) and model.state_dict()[name].dtype == tensor.dtype

    sizes = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    assert quantized_fraction(plain) == 0 and bytes_per_parameter(plain) == 2
    assert quantized_fraction(model) == sum(sizes[name] for name in names) / sum(sizes.values()) > 0.94
    wide = DeepseekV3ForCausalLM(tiny_config(hidden_size=256, moe_intermediate_size=256)).bfloat16()
    size = bytes_per_parameter(quantize_nf4_(wide))
    assert 0.5159 * quantized_fraction(wide) + 2 * (1 - quantized_fraction(wide)) < size < 0.6
    assert (saved / "config.json").read_bytes() == config


def test_generation_and_gradients_equal_those_of_the_dequantized_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, quantization_config=nf4_config())
    plain = dequantize_(copy.deepcopy(model))
    inputs = tokens(2, 7)
    with torch.no_grad():
        assert relative_error(model(inputs).logits, plain(inputs).logits) <= 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(inputs, **options), plain.generate(inputs, **options))

    found = []
    for each in (model.train(), plain.train()):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point and ("norm" in name or "embed" in name))
        for _ in range(2):
            each.zero_grad()
            each(inputs, labels=inputs).loss.backward()
        found.append(gradients(each))
    assert set(found[0]) == set(found[1])
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_evaluation_leaves_the_weights_alone(saved: Path) -> None:
    """bitsandbytes repacks 4-bit layers for CPUs with AVX512-BF16, with rounded scales, when they are evaluated."""
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, quantization_config=nf4_config())
    before = copy.deepcopy(model)
    with torch.no_grad():
        model(tokens(1, 5))
    same_state(model, before)


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    config = tiny_config(hidden_size=256, moe_intermediate_size=128, num_nextn_predict_layers=0, vocab_size=31)
    model = quantize_nf4_(DeepseekV3ForCausalLM(config)).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    smallest = 8 * 128 * 256  # of the down projections of a layer's experts
    saved_sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved_sizes.append(tensor.numel() * tensor.dtype.is_floating_point)
        return tensor

    embeddings = torch.randn(1, 6, 256, requires_grad=True)
    gc.collect()
    before = {id(tensor) for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(inputs_embeds=embeddings, skip_logits=False).logits.square().sum()
    new = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and id(each) not in before]
    assert saved_sizes and max(saved_sizes) < smallest / 8
    assert max(each.numel() for each in new) < smallest / 8
    loss.backward()
    assert embeddings.grad.abs().max() > 0


def test_loading_holds_one_layer_in_full_precision_at_a_time(tmp_path: Path, monkeypatch) -> None:
    config = tiny_config(hidden_size=128, num_hidden_layers=7, num_nextn_predict_layers=0)
    DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(tmp_path, max_shard_size="300KB")
    experts = 8 * 3 * config.hidden_size * config.moe_intermediate_size * 2
    held: list[int] = []
    pack = nf4_module.pack_experts_

    def count(*args):
        live = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta]
        storages = {each.data_ptr(): each.untyped_storage().nbytes() for each in live if each.dtype == torch.bfloat16}
        held.append(sum(storages.values()))
        pack(*args)

    monkeypatch.setattr(nf4_module, "pack_experts_", count)
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4_config())
    rest = sum(parameter.nbytes for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4 and len(held) == 12
    assert max(held) <= rest + 1.5 * experts, (max(held), rest, experts)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dequantizing_gives_the_plain_model_back(saved: Path, tmp_path: Path, dtype) -> None:
    original = DeepseekV3ForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, quantization_config=nf4_config())
    values = {name: module[3] for name, module in model.named_modules() if isinstance(module, NF4Weight)}
    assert dequantize_(model, dtype) is model
    kinds = {name: type(module) for name, module in original.named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = model.state_dict()
    for name, tensor in original.state_dict().items():
        assert state[name].shape == tensor.shape
        assert state[name].dtype == ("bias" in name and torch.float32 or dtype or torch.bfloat16)
        if "_proj" in name:
            assert 0.02 < (state[name].float() - tensor.float()).norm() / tensor.float().norm() < 0.11, name
    for name, value in values.items():
        assert torch.equal(state[name][3].bfloat16(), value)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    same_state(DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=dtype or torch.bfloat16), model)


def test_what_is_refused(saved: Path, tmp_path: Path, caplog) -> None:
    model = quantize_nf4_(causal())
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "quantized")
    assert "save the adapter" in caplog.text and not (tmp_path / "quantized").exists()
    with pytest.raises(ValueError, match="quantized already"):
        quantize_nf4_(model)
    for name in ("half", "float"):
        with pytest.raises(ValueError, match="not supported for quantized"):
            getattr(model, name)()
    with pytest.raises(ValueError, match="not quantized, allowed is one that is"):
        dequantize_(causal())
    with pytest.raises(ValueError, match="skip: found 'kv_b', allowed are names"):
        quantize_nf4_(causal(), skip=["kv_b"])
    with pytest.raises(ValueError, match="skip: found the string 'experts'"):
        nf4_config(skip="experts")
    with pytest.raises(ValueError, match="experts_implementation: found 'grouped_mm'"):
        quantize_nf4_(causal(experts="grouped_mm"))
    with pytest.raises(ValueError, match="experts_implementation: found 'batched_mm'"):
        options = {"quantization_config": nf4_config(), "experts_implementation": "batched_mm"}
        AutoModelForCausalLM.from_pretrained(saved, **options)

    copied = shutil.copytree(saved, tmp_path / "stored")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": nf4_config().to_dict()}))
    with pytest.raises(ValueError, match="quant_method is 'deepseek_v3_nf4', allowed are fp8"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_loader_that_misses_experts_is_found_out(saved: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        nf4_module.NF4Quantizer,
        "param_needs_quantization",
        lambda self, model, name: isinstance(model.get_submodule(name.rpartition(".")[0]), NF4Linear),
    )
    with pytest.raises(ValueError, match="6 weights are not in NF4.*experts.gate_up_proj"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=nf4_config())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [0, 3])
def test_choices_of_other_ranks_add_nothing(grad: bool, rows: int) -> None:
    """An index of E marks an expert that another rank computes; here there is no other choice, or no token."""
    torch.manual_seed(0)
    config = tiny_config()
    config._experts_implementation = "deepseek_v3"
    experts = DeepseekV3Experts(config)
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.randn(getattr(experts, name).shape)
        delattr(experts, name)
        setattr(experts, name, NF4Weight.quantize(weight))
    indices = torch.full((rows, 2), config.n_routed_experts)
    with torch.set_grad_enabled(grad):
        output = experts(torch.randn(rows, config.hidden_size), indices, torch.ones(rows, 2))
    assert torch.equal(output, torch.zeros(rows, config.hidden_size))
