"""The wrappers against plain PEFT's on the same model: outputs, gradients, files, merging, several adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import nn

from deepseek_v3.finetuning.adapters import load_adapter
from deepseek_v3.finetuning.lora import adapted, apply_lora, lora_config, set_dropout
from deepseek_v3.finetuning.lora_layers import (
    ExpertsLora,
    Linear4bitLora,
    LinearLora,
    RouterLora,
    WeightLora,
    register_layers,
)
from deepseek_v3.quantization import quantize_nf4_
from tests.finetuning.helpers import PATTERN_WARNING, adapted_pair, base, plain, quantize_experts, randomized
from tests.modeling_deepseek_v3.helpers import (
    assert_same_gradients,
    build,
    gradients,
    relative_error,
    run_python,
    stock_twin,
    tiny_config,
    tokens,
)

pytestmark = pytest.mark.filterwarnings(PATTERN_WARNING)
SETS = ["attention", "dense_mlp", "shared_experts", "experts", "router"]


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens(2, 11)).logits


def loss_gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.train()
    x = tokens(2, 11)
    model(input_ids=x, labels=x, use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("target", [*SETS, "all"])
def test_gradients_are_plain_pefts(target) -> None:
    ours, theirs = adapted_pair(torch.float64, targets=[target], rank=3)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5
    expected = loss_gradients(theirs)
    assert expected and all(".lora_" in name and gradient.any() for name, gradient in expected.items())
    assert_same_gradients(loss_gradients(ours), expected, 1e-5)


def test_gradients_in_bf16_stay_close_to_fp64() -> None:
    ours, _ = adapted_pair(torch.bfloat16, targets=["all"], rank=4)
    _, exact = adapted_pair(torch.float64, targets=["all"], rank=4)
    exact.load_state_dict({name: tensor.double() for name, tensor in ours.state_dict().items()})
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)
    found, expected = loss_gradients(ours), loss_gradients(exact)
    close = [torch.cosine_similarity(found[n].flatten().double(), expected[n].flatten(), 0) for n in expected]
    assert sorted(close)[len(close) // 2] > 0.99 and min(close) > 0.8  # a choice of experts may fall the other way


def test_gradients_of_mtp_layers_are_plain_pefts() -> None:
    ours, theirs = adapted_pair(torch.float64, mtp=1, targets=["all"], rank=2)
    expected = loss_gradients(theirs)
    assert any("layers.3." in name for name in expected)
    assert_same_gradients(loss_gradients(ours), expected, 1e-5)


def test_which_layer_serves_what() -> None:
    model = apply_lora(base(), ["all", "router"], rank=2)
    expected = {"attention": LinearLora, "experts": ExpertsLora, "mlp.gate.weight": RouterLora}
    for name, layer in adapted(model):
        key = "attention" if "self_attn" in name else "experts" if ".experts." in name else name[-15:]
        assert type(layer) is expected.get(key, WeightLora), name


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_are_computed_in_the_dtype_of_the_activations(quantized) -> None:
    model = base().to(torch.bfloat16)
    model = apply_lora(quantize_nf4_(model) if quantized else model, ["attention", "shared_experts"], rank=2)
    seen = set()
    layers = [layer for _, layer in adapted(model)]
    kind = Linear4bitLora if quantized else LinearLora
    assert {type(layer) for layer in layers} == {kind, WeightLora}
    for layer in layers:
        layer.lora_B["default"].register_forward_hook(lambda module, _, output: seen.add(output.dtype))
    found = loss_gradients(model)
    assert seen == {torch.bfloat16} and {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_what_is_special_to_peft_is_left_to_it() -> None:
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["kv_b_proj", "o_proj"], "init_lora_weights": False}
    for options in ({"use_dora": True}, {"lora_bias": True}):
        if "lora_bias" in options:
            model = build(tiny_config(attention_bias=True))
            config["target_modules"] = ["o_proj"]
        else:
            model = base()
        theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**config, **options))
        ours = get_peft_model(model, register_layers(LoraConfig(**config, **options)))
        ours.load_state_dict(theirs.state_dict())
        assert any(type(layer) is LinearLora for _, layer in adapted(ours))
        assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("weights", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_one_or_both_weights_of_the_experts(weights) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in weights])
    theirs = randomized(get_peft_model(base(), plain(config)))
    ours = randomized(get_peft_model(base(), register_layers(config)))
    assert sum(isinstance(module, ExpertsLora) for module in ours.modules()) == 2 * len(weights)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5
    assert_same_gradients(loss_gradients(ours), loss_gradients(theirs), 1e-5)


@pytest.mark.parametrize("target", [*SETS, "all"])
def test_plain_peft_loads_what_we_save_on_ours_and_on_stock(target, tmp_path) -> None:
    ours = randomized(apply_lora(base(), [target], rank=2))
    expected = logits(ours)
    assert relative_error(logits(base()), expected) > 1e-2
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert all(type(layer) in (Linear, ParamWrapper) for _, layer in adapted(again))
    assert relative_error(logits(again), expected) < 1e-5
    for experts in ("eager", "grouped_mm"):
        stock = PeftModel.from_pretrained(stock_twin(base(), experts_implementation=experts), tmp_path)
        assert relative_error(logits(stock), expected) < 1e-5
    assert relative_error(logits(load_adapter(base(), tmp_path)), expected) < 1e-5


def test_we_load_what_plain_peft_saves_of_stock(tmp_path) -> None:
    stock = stock_twin(base())
    theirs = randomized(get_peft_model(stock, plain(lora_config(base().config, ["all"], rank=3))))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base(), tmp_path, trainable=True)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in ours.named_parameters())
    assert not any(parameter.requires_grad for parameter in load_adapter(base(), tmp_path).parameters())


def test_adapters_of_mtp_layers_do_not_disturb_stock(tmp_path) -> None:
    ours = randomized(apply_lora(base(mtp=1), ["all"], rank=2, mtp=True))
    ours.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, load_adapter):
        stock = load(stock_twin(base(mtp=1)), tmp_path)
        assert relative_error(logits(stock), logits(ours)) < 1e-5


def test_the_wrappers_serve_stock_experts_too(tmp_path) -> None:
    ours = randomized(apply_lora(base(), ["experts"], rank=2))
    ours.save_pretrained(tmp_path)
    stock = load_adapter(stock_twin(base()), tmp_path, trainable=True)
    assert sum(isinstance(module, ExpertsLora) for module in stock.modules()) == 4
    assert relative_error(logits(stock), logits(ours)) < 1e-5
    assert_same_gradients(loss_gradients(stock), loss_gradients(ours), 1e-5)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_back(safe) -> None:
    ours = randomized(apply_lora(base(), ["all", "router"], rank=2))
    expected, before = logits(ours), {name: t.clone() for name, t in base().state_dict().items()}
    ours.merge_adapter(safe_merge=safe)
    assert relative_error(logits(ours), expected) < 1e-5
    ours.unmerge_adapter()
    assert relative_error(logits(ours), expected) < 1e-5
    ours.merge_adapter()
    with ours.disable_adapter():  # takes the adapters out again
        assert relative_error(logits(ours), logits(base())) < 1e-5
    merged = ours.merge_and_unload(safe_merge=safe)
    assert relative_error(logits(merged), expected) < 1e-5
    assert merged.state_dict().keys() == before.keys()
    assert not torch.equal(merged.state_dict()["model.layers.1.mlp.experts.down_proj"],
                           before["model.layers.1.mlp.experts.down_proj"])  # fmt: skip


def test_stock_transformers_reads_the_merged_model(tmp_path) -> None:
    ours = randomized(apply_lora(base(mtp=1), ["all", "router"], rank=2, mtp=True))
    expected = logits(ours)
    merged = ours.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.save((tokens(2, 11), expected), tmp_path / "expected.pt")
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
assert "deepseek_v3" not in sys.modules, "the package was imported"
x, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    print(float((model(x).logits - expected).abs().max() / expected.abs().max()))
"""
    assert float(run_python(program, tmp_path)) < 1e-5


def test_disabled_adapters() -> None:
    ours = randomized(apply_lora(base(), ["all", "router"], rank=2))
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(base()))
    assert relative_error(logits(ours), logits(base())) > 1e-2


def test_adapter_names_are_refused() -> None:
    ours = apply_lora(base(), ["experts"], rank=2).eval()
    with pytest.raises(ValueError, match="mixed adapter batches"):
        ours(input_ids=tokens(2, 5), adapter_names=["default", "__base__"])


def test_several_adapters(tmp_path) -> None:
    config = base().config
    first = lora_config(config, ["all"], rank=2)
    ours, theirs = (get_peft_model(base(dtype=torch.float64), c) for c in (first, plain(first)))
    for model, prepare in ((ours, lambda c: c), (theirs, plain)):
        model.add_adapter("second", prepare(lora_config(config, ["all"], rank=3, alpha=3)))
        randomized(model)
    assert sum(isinstance(module, ExpertsLora) for module in ours.modules()) == 4  # the second is in the same wrappers
    outputs = []
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        outputs.append(logits(ours))
        assert relative_error(outputs[-1], logits(theirs)) < 1e-5
        assert_same_gradients(loss_gradients(ours), loss_gradients(theirs), 1e-5)
    assert relative_error(outputs[0], outputs[1]) > 1e-2 < relative_error(outputs[2], outputs[0])
    ours.merge_adapter(["default", "second"])
    assert relative_error(logits(ours), outputs[2]) < 1e-5

    theirs.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = apply_lora(base(dtype=torch.float64), ["all"], rank=2)
    loaded = load_adapter(loaded, tmp_path / "second", adapter_name="second")
    loaded.set_adapter("second")
    assert relative_error(logits(loaded), outputs[1]) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant) -> None:
    ours = randomized(apply_lora(base(), ["all"], rank=2, dropout=0.3))
    expected = loss_gradients(ours)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(loss_gradients(ours), expected, 1e-6)


def test_dropout_only_while_training() -> None:
    ours = randomized(apply_lora(base(), ["all"], rank=2))
    without, expected = loss_gradients(ours), logits(ours)
    set_dropout(ours, 0.5)
    assert torch.equal(logits(ours), expected)
    dropped = loss_gradients(ours)
    assert all(not torch.equal(dropped[name], without[name]) for name in without)
    assert ours.peft_config["default"].lora_dropout == 0
    set_dropout(ours, 0.0)
    assert_same_gradients(loss_gradients(ours), without, 0.0)
    model = apply_lora(base(), ["router"], rank=2)
    with pytest.raises(ValueError, match="dropout: found 0.1 with target 'router'"):
        set_dropout(model, 0.1)


def test_dropout_is_unbiased() -> None:
    """The mean over many masks is the output without; for one layer, where the output is linear in B."""
    ours = randomized(apply_lora(base(), ["experts"], rank=2))
    layer = ours.get_base_model().model.layers[1].mlp.experts
    x, indices, weights = torch.randn(4, 64), torch.randint(8, (4, 2)), torch.rand(4, 2)
    nn.init.zeros_(layer.base_layer.lora_B["default"].weight)  # else gate and up are not linear in the mask
    with torch.no_grad():
        expected = layer(x, indices, weights)
        set_dropout(ours, 0.4)
        layer.train()
        found = torch.stack([layer(x, indices, weights) for _ in range(400)])
    error = (found.mean(0) - expected).abs() / (found.std(0) / 20)
    assert error.mean() < 1.2 and found.std(0).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_experts(dtype, tmp_path) -> None:
    ours = randomized(apply_lora(base(dtype=dtype), ["experts", "attention"], rank=2))
    model = base(dtype=dtype)
    quantized = quantize_experts(model)
    model = randomized(apply_lora(model, ["experts", "attention"], rank=2))
    assert [weight for weight in model.modules() if type(weight).__name__ == "FakeQuantized"] == quantized
    assert model.state_dict().keys() - ours.state_dict().keys() == {  # in their places again
        f"base_model.model.model.layers.{n}.mlp.experts.base_layer.base_layer.{name}.halved"
        for n in (1, 2)
        for name in ("gate_up_proj", "down_proj")
    }
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for _, layer in adapted(model))
    assert torch.equal(logits(model), logits(ours))
    assert_same_gradients(loss_gradients(model), loss_gradients(ours), 0.0)

    model.save_pretrained(tmp_path)
    again = base(dtype=dtype)
    quantize_experts(again)
    assert torch.equal(logits(load_adapter(again, tmp_path)), logits(ours))
    with pytest.raises(ValueError, match="down_proj: found a quantized weight"):
        model.merge_and_unload()


def test_attention_adapters_on_quantized_experts() -> None:
    ours = randomized(apply_lora(base(), ["attention"], rank=2))
    model = base()
    quantize_experts(model)
    model = randomized(apply_lora(model, ["attention"], rank=2))
    assert relative_error(logits(model), logits(ours)) < 1e-5
    assert_same_gradients(loss_gradients(model), loss_gradients(ours), 1e-5)


@pytest.mark.parametrize("targets", [["attention"], ["experts"], ["all"]])
def test_generation_is_the_merged_models(targets) -> None:
    """With an adapter on `kv_b_proj` decoding may not read the bare weight, which the absorbed form would."""
    ours = randomized(apply_lora(base(), targets, rank=2)).eval()
    prompt = tokens(1, 7)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = ours.generate(input_ids=prompt, **options)
    plain_text = base().generate(input_ids=prompt, **options).sequences
    expected = ours.merge_and_unload().generate(input_ids=prompt, **options)
    assert torch.equal(found.sequences, expected.sequences) and not torch.equal(found.sequences, plain_text)
    assert max(relative_error(a, b) for a, b in zip(found.logits, expected.logits, strict=True)) < 1e-4


def test_without_gradients_only_the_chosen_quantized_experts_are_read() -> None:
    """In batches of several tokens too; the result is that of the path with gradients."""
    model = base()
    quantize_experts(model)
    model = randomized(apply_lora(model, targets=("experts",), rank=2))
    ids = tokens(2, 3)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert relative_error(found, model(input_ids=ids).logits.detach()) < 1e-5
