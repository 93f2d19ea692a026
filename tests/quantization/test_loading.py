"""Quantized checkpoints: what they stand for, that they stay packed, that they are written as they were, and LoRA."""

import copy
import gc
import io
import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3Model
from deepseek_v3.finetuning.adapters import load_adapter
from deepseek_v3.finetuning.lora import apply_lora, report_trainable
from deepseek_v3.finetuning.quantized_merge import merge_quantized
from deepseek_v3.quantization import (
    PackedWeight,
    bytes_per_parameter,
    dequantize_,
    nf4_config,
    packed_config,
    quantize_nf4_,
    quantized_fraction,
)
from deepseek_v3.quantization.packed_weight import PackedLinear
from tests.modeling_deepseek_v3.checkpoints import PEAK
from tests.modeling_deepseek_v3.helpers import (
    build,
    gradients,
    randomize,
    relative_error,
    run_python,
    tiny_config,
    tokens,
)
from tests.quantization import stored

FORMATS = list(stored.FORMATS)
WEIGHTS_ONLY = [name for name in FORMATS if not name.startswith("int8")]  # the others quantize activations too
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, stored.Tensors]]:
    return {name: stored.write(tmp_path_factory.mktemp(name), name) for name in FORMATS}


def load(folder: Path, packed: bool = True, **options) -> PreTrainedModel:
    options = {"dtype": torch.float32, **options}
    config = packed_config(dequantize=not packed)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def official(model: PreTrainedModel) -> stored.Tensors:
    """The weights that a model stands for, by official names."""
    found: stored.Tensors = {}
    for name, weight in model.named_modules():
        if isinstance(weight, PackedWeight):
            found[name] = weight.dequantize()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in found:
            found[name] = tensor
    for name in [name for name in found if ".experts." in name]:
        prefix, _, weight = name.rpartition(".")
        for expert, matrix in enumerate(found.pop(name)):
            parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for projection, part in (parts if weight == "gate_up_proj" else {"down_proj": matrix}).items():
                found[f"{prefix}.{expert}.{projection}.weight"] = part
    return found


def assert_bytes_equal(found: stored.Tensors, expected: stored.Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_checkpoint_is_what_its_maker_meant(name: str, packed: bool, checkpoints) -> None:
    folder, meant = checkpoints[name]
    found = official(load(folder, packed))
    copies = ("2.embed_tokens.weight", "2.shared_head.head.weight")
    assert found.keys() == {key for key in meant if not key.endswith(copies)}
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, meant[key].float(), rtol=3e-7, atol=0, msg=key)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [0, 3])
def test_weights_stay_packed_and_are_written_as_they_were(name: str, shards: int, tmp_path) -> None:
    folder, meant = stored.write(tmp_path / "read", name, shards=shards)
    model = load(folder, dtype=torch.bfloat16)
    assert not model.training and model.is_quantized
    packed = {key for key, module in model.named_modules() if isinstance(module, PackedWeight)}
    linears, experts = 3 * 5 + 3 + 2 * 3, 2 * 2
    assert len(packed) == (experts if name in stored.ROUTED_ONLY else linears + experts)
    weights = sum(tensor.numel() for key, tensor in meant.items() if stored.is_linear(key))
    total = sum(t.numel() for k, t in model.named_parameters() if k.rpartition(".")[0] not in packed)
    if name not in stored.ROUTED_ONLY:
        assert quantized_fraction(model) == pytest.approx(weights / (weights + total))
        size = {"fp8": 1, "int4": 0.5 + 2 / 32, "int8": 1, "nf4": 0.52, "nf4-single": 0.5625, "bnb-int8": 1}[name]
        expected = (size * weights + 2 * total) / (weights + total)
        assert 0.999 * expected < bytes_per_parameter(model) < 1.08 * expected  # scales of small layers

    with torch.no_grad():  # bitsandbytes repacks weights in an evaluation on CPUs with AVX512-BF16
        model(tokens(2, 9))
        model.generate(tokens(1, 4), **GREEDY)
    model.save_pretrained(tmp_path / "written")
    assert_bytes_equal(stored.tensors_of(tmp_path / "written"), stored.tensors_of(folder))
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "written"))
    assert after["quantization_config"] == stored.FORMATS[name][1] and after["dtype"] == "bfloat16"
    assert before == after
    again = load(tmp_path / "written", dtype=torch.bfloat16)
    assert_bytes_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_loading_a_state_replaces_what_was_made_of_the_old_one(name: str, checkpoints, tmp_path: Path) -> None:
    """The CPU's layout of INT4, and the projection that decoding keeps dequantized."""
    other = randomize(build(tiny_config(**stored.SIZES)), seed=5)
    folders = [checkpoints[name][0], stored.write(tmp_path / name, name, other)[0]]
    model, other = (load(folder, dtype=torch.bfloat16) for folder in folders)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    before, expected = (torch.cat(each.generate(tokens(1, 9), **options).logits) for each in (model, other))
    assert not torch.equal(before, expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(torch.cat(model.generate(tokens(1, 9), **options).logits), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantized_model(name: str, checkpoints) -> None:
    """W8A8 also rounds activations, to within a 254th of a token's largest."""
    folder, _ = checkpoints[name]
    inputs = tokens(3, 11)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        with torch.no_grad():
            found, expected = (load(folder, packed, dtype=dtype)(inputs).logits for packed in (True, False))
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert found.dtype == dtype and error < (tolerance if name in WEIGHTS_ONLY else 0.06)
        assert name in WEIGHTS_ONLY or error > 1e-4


@pytest.mark.parametrize(
    "name, experts", [*((name, "deepseek_v3") for name in WEIGHTS_ONLY), ("int4", "eager"), ("nf4", "eager")]
)
def test_generation_equals_that_of_the_dequantized_model(name: str, experts: str, checkpoints) -> None:
    folder, _ = checkpoints[name]
    model, plain = (load(folder, packed, experts_implementation=experts) for packed in (True, False))
    for inputs in (tokens(1, 5), tokens(3, 5)):
        expected = plain.generate(inputs, **GREEDY)
        assert torch.equal(model.generate(inputs, **GREEDY), expected)
    inputs = tokens(1, 5)
    drafted = model.generate(inputs, use_mtp=True, num_mtp_draft=1, **GREEDY)
    assert torch.equal(drafted, plain.generate(inputs, **GREEDY))


@pytest.mark.parametrize("name", ["int8", "int8-experts"])
def test_int8_generates_the_same_with_and_without_a_cache_and_drafts(name: str, checkpoints) -> None:
    """Activations are rounded token by token, so that it does not matter which are computed together."""
    model = load(checkpoints[name][0])
    inputs = tokens(1, 5)
    expected = model.generate(inputs, **GREEDY)
    for options in ({"use_cache": False}, {"use_mtp": True, "num_mtp_draft": 1}):
        assert torch.equal(model.generate(inputs, **options, **GREEDY), expected), options


def test_layers_have_their_biases_and_take_any_shape(tmp_path) -> None:
    model = build(tiny_config(**stored.SIZES, attention_bias=True))
    folder, _ = stored.write(tmp_path, "nf4", model)
    packed, plain = load(folder), load(folder, False)
    layer, expected = (each.model.layers[0].self_attn.o_proj for each in (packed, plain))
    assert isinstance(layer, PackedLinear) and layer.bias.abs().max() > 0
    for shape in ((), (0,), (1,), (2, 3), (2, 1, 3), (0, 3)):
        x = torch.randn(*shape, layer.in_features)
        torch.testing.assert_close(layer(x), expected(x))
    assert layer(torch.randn(2, layer.in_features).bfloat16()).dtype == torch.bfloat16


# --- what is loaded how --------------------------------------------------------------------------------------------


def test_fp8_on_a_cpu_is_dequantized_unless_told_otherwise(checkpoints) -> None:
    folder, _ = checkpoints["fp8"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert not [each for each in model.modules() if isinstance(each, PackedWeight)]
    packed = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=packed_config())
    assert not [each for each in packed.modules() if isinstance(each, PackedWeight)]
    for name in FORMATS[1:]:
        model = AutoModelForCausalLM.from_pretrained(checkpoints[name][0])
        assert [each for each in model.modules() if isinstance(each, PackedWeight)], name


@pytest.mark.parametrize("packed", [True, False])
def test_transformers_own_arguments_are_understood(packed: bool, checkpoints) -> None:
    from transformers import FineGrainedFP8Config

    for config in (FineGrainedFP8Config(dequantize=not packed), {"quant_method": "fp8", "dequantize": not packed}):
        model = AutoModelForCausalLM.from_pretrained(checkpoints["fp8"][0], quantization_config=config)
        assert any(isinstance(each, PackedWeight) for each in model.modules()) == packed


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_into_nf4(name: str, checkpoints) -> None:
    folder, _ = checkpoints[name]
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4_config())
    expected = quantize_nf4_(load(folder, False))
    assert_bytes_equal(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", FORMATS)
def test_other_heads(name: str, checkpoints, tmp_path) -> None:
    folder, _ = checkpoints[name]
    causal = load(folder)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=packed_config(dequantize=False))
    assert type(base) is DeepseekV3Model and any(isinstance(each, PackedWeight) for each in base.modules())
    inputs = tokens(2, 7)
    with torch.no_grad():
        expected = causal.model(inputs).last_hidden_state
        assert torch.equal(base(inputs).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = DeepseekV3Model.from_pretrained(tmp_path / "base", quantization_config=packed_config(dequantize=False))
    assert_bytes_equal(again.state_dict(), base.state_dict())

    options = {"num_labels": 3, "pad_token_id": 0, "quantization_config": packed_config(dequantize=False)}
    classifier = DeepseekV3ForSequenceClassification.from_pretrained(folder, **options)
    assert type(classifier.score) is not PackedLinear and classifier.score.weight.isfinite().all()
    assert not [key for key in classifier.state_dict() if key.startswith("model.layers.2.")]
    classifier(inputs)
    without = load(folder, num_nextn_predict_layers=0)
    assert without.mtp_layers == []


def test_a_model_moves_copies_and_pickles_with_its_weights(checkpoints) -> None:
    for name in FORMATS:
        model = load(checkpoints[name][0], dtype=torch.bfloat16)
        inputs = tokens(1, 6)
        with torch.no_grad():
            expected = model(inputs).logits
            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
            buffer.seek(0)
            state = torch.load(buffer)
            copied = copy.deepcopy(model)
            for parameter in copied.parameters():
                parameter.zero_()
            copied.load_state_dict(state)
            assert torch.equal(copied(inputs).logits, expected)
            model.model.to(torch.float64)
            for weight in (each for each in model.modules() if isinstance(each, PackedWeight)):
                dtypes = {part: dtype for part, (dtype, _) in weight.layout.parts(weight.matrix).items()}
                assert dtypes == {part: tensor.dtype for part, tensor in weight.parts.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_dequantizing_in_memory_equals_loading_dequantized(name: str, checkpoints) -> None:
    folder, _ = checkpoints[name]
    for found in (dequantize_(load(folder)), load(folder).dequantize()):
        expected = load(folder, False)
        assert_bytes_equal(found.state_dict(), expected.state_dict())
        kinds = {key: type(module) for key, module in expected.named_modules()}
        assert {key: type(module) for key, module in found.named_modules()} == kinds
        assert not hasattr(found.config, "quantization_config") and not found.is_quantized


# --- training on top -----------------------------------------------------------------------------------------------


def fill(model: nn.Module) -> nn.Module:
    """Factors as large as in training; B is zero at first."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    inputs = tokens(3, 12)
    for _ in range(2):
        model.zero_grad()
        model(input_ids=inputs, labels=inputs).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_adapters_equal_those_on_the_dequantized_base(name: str, checkpoints) -> None:
    """Through activations that were rounded to 8 bits gradients pass as if they had not been."""
    folder, _ = checkpoints[name]
    options = {"targets": ["all", "router"], "rank": 4, "mtp": True}
    found, expected = (trained(fill(apply_lora(load(folder, packed), **options))) for packed in (True, False))
    assert found.keys() == expected.keys() and len(found) == 2 * (3 * 5 + 3 * 3 + 2 + 2 * 2)
    errors = {key: ((found[key] - g).norm() / g.norm()).item() for key, g in expected.items()}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert max(errors.values()) < (1e-5 if name in WEIGHTS_ONLY else 0.5)
    if name not in WEIGHTS_ONLY:
        assert sorted(errors.values())[len(errors) // 2] < 0.1


@pytest.mark.parametrize("name", FORMATS)
def test_peft_alone_adapts_the_attention(name: str, checkpoints) -> None:
    folder, _ = checkpoints[name]
    config = LoraConfig(r=4, target_modules=["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"])
    model = fill(get_peft_model(load(folder), config))
    found = trained(model)
    assert len(found) == 2 * 3 * 4
    if name in WEIGHTS_ONLY:
        expected = trained(fill(get_peft_model(load(folder, False), config)))
        assert max(relative_error(found[key], expected[key]) for key in expected) < 1e-5
    if name not in stored.ROUTED_ONLY:
        with pytest.raises(ValueError, match="a packed weight is frozen"):
            model.merge_and_unload()


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_is_saved_loaded_and_merged(name: str, checkpoints, tmp_path) -> None:
    folder, _ = checkpoints[name]
    model = fill(apply_lora(load(folder), ["all"], rank=4)).eval()
    report = report_trainable(model)
    assert 0.05 < report["quantized_byte_fraction"] < 1
    assert report["parameters"] > quantized_fraction(model) * report["parameters"] > 0
    model.save_pretrained(tmp_path)
    inputs = tokens(2, 8)
    again = load_adapter(load(folder), tmp_path).eval()
    with torch.no_grad():
        expected = model(inputs).logits
        assert torch.equal(again(inputs).logits, expected)
        on_plain = load_adapter(load(folder, False), tmp_path).eval()(inputs).logits
        merged = merge_quantized(model)
        assert not [each for each in merged.modules() if isinstance(each, PackedWeight)]
        assert relative_error(merged(inputs).logits, on_plain) < 1e-5


def test_an_adapter_of_transformers_is_saved_without_its_base(checkpoints, tmp_path) -> None:
    model = load(checkpoints["int4"][0])
    model.add_adapter(LoraConfig(r=2, target_modules=["o_proj"]))
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in stored.ROUTED_ONLY])
def test_nothing_of_a_weights_size_is_kept_for_backward(name: str, checkpoints) -> None:
    model = load(checkpoints[name][0])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:7], requires_grad=False)  # is kept as any plain weight
    smallest = 96 * 160  # of an expert's matrix
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.dtype.is_floating_point * (tensor.dtype.itemsize > 1))
        return tensor

    embeddings = torch.randn(1, 3, 160, requires_grad=True)
    gc.collect()
    before = {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(inputs_embeds=embeddings, skip_logits=False).logits.square().sum()
    new = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and id(each) not in before]
    assert max(sizes) < smallest / 4 and max(each.numel() for each in new) < smallest / 4
    loss.backward()
    assert embeddings.grad.abs().max() > 0


def test_packed_weights_never_train(checkpoints) -> None:
    for name in FORMATS:
        model = load(checkpoints[name][0])
        packed = [each for each in model.modules() if isinstance(each, PackedWeight)]
        assert not [part for each in packed for part in each.parameters() if part.requires_grad]
        assert model.model.norm.weight.requires_grad


@pytest.mark.parametrize("name", FORMATS)
def test_offloading_is_refused(name: str, checkpoints, tmp_path: Path) -> None:
    """accelerate brings weights to modules that are called; the products of others would take what memory holds."""
    modules = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places = {**dict.fromkeys(modules, "cpu"), **{f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(9)}}
    with pytest.raises(ValueError, match="device_map: found cpu, disk, allowed with packed weights are GPUs only"):
        load(checkpoints[name][0], device_map=places, offload_folder=tmp_path)
    model = cpu_offload(load(checkpoints[name][0], device_map={"": "cpu"}), torch.device("cpu"))
    with pytest.raises(ValueError, match="a packed weight holds no numbers: it was offloaded"):
        model(tokens(1, 4))


def test_other_experts_implementations_are_refused(checkpoints) -> None:
    with pytest.raises(ValueError, match="experts_implementation: found 'grouped_mm'"):
        load(checkpoints["int4"][0], experts_implementation="grouped_mm")


def test_a_loaded_models_configuration_loads_it_again(checkpoints) -> None:
    folder, _ = checkpoints["int4"]
    config = load(folder).config
    again = DeepseekV3ForCausalLM.from_pretrained(folder, config=config)
    assert any(isinstance(each, PackedWeight) for each in again.modules())
    assert json.loads(config.to_json_string())["quantization_config"] == stored.FORMATS["int4"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
def test_loading_needs_little_more_memory_than_the_packed_model(name: str, tmp_path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 384, "n_routed_experts": 64, "num_hidden_layers": 6}
    stored.write(tmp_path / "large", name, shards=3, **sizes)
    stored.write(tmp_path / "tiny", name)
    # Freed memory goes back at once, so that live memory is measured and not malloc's reserve.
    output = run_python(PEAK, tmp_path / "tiny", tmp_path / "large", MALLOC_MMAP_THRESHOLD_="65536")
    growth, size = map(int, output.split())
    assert 90e6 < size < 300e6
    assert 0.9 * size < growth < 1.3 * size, growth / size
# to append to tests/quantization/test_loading.py together with attention.patch


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_decoding_absorbs_a_packed_projection(name: str, checkpoints, monkeypatch) -> None:
    """A step of decoding does not expand the whole cache."""
    model, plain = (load(checkpoints[name][0], packed, attn_implementation="sdpa") for packed in (True, False))
    expected = plain.generate(tokens(2, 5), **GREEDY)
    attention = type(model.model.layers[0].self_attn)
    expanded, rows = attention._expanded, []

    def count(self, queries, *args, **kwargs):
        rows.append(queries.shape[1])
        return expanded(self, queries, *args, **kwargs)

    monkeypatch.setattr(attention, "_expanded", count)
    assert torch.equal(model.generate(tokens(2, 5), **GREEDY), expected)
    assert set(rows) == {5}  # of the prompt only
