"""Which tensors an adapter has, that exactly those train, and what its configuration and files say."""

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from deepseek_v3 import DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification
from deepseek_v3.finetuning.adapters import load_adapter
from deepseek_v3.finetuning.lora import (
    TARGETS,
    apply_lora,
    lora_config,
    report_trainable,
    target_names,
    target_of,
    trainable_table,
)
from deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from tests.finetuning.helpers import PATTERN_WARNING, base, plain, quantize_experts, randomized
from tests.modeling_deepseek_v3.helpers import relative_error, tiny_config, tokens

pytestmark = pytest.mark.filterwarnings(PATTERN_WARNING)
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")
EXPECTED = {  # the modules with adapters, in a model with layer 0 dense and layers 1 and 2 sparse
    "attention": {f"layers.{n}.self_attn.{name}" for n in range(3) for name in ATTENTION},
    "dense_mlp": {f"layers.0.mlp.{name}" for name in SWIGLU},
    "shared_experts": {f"layers.{n}.mlp.shared_experts.{name}" for n in (1, 2) for name in SWIGLU},
    "experts": {f"layers.{n}.mlp.experts{inner}" for n in (1, 2) for inner in ("", ".base_layer")},
    "router": {f"layers.{n}.mlp.gate" for n in (1, 2)},
}
EXPECTED["all"] = set().union(*(EXPECTED[name] for name in ("attention", "dense_mlp", "shared_experts", "experts")))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def factors(modules: set[str]) -> set[str]:
    prefix = "base_model.model.model."
    return {f"{prefix}{module}.lora_{factor}.default.weight" for module in modules for factor in "AB"}


def step(model: nn.Module) -> set[str]:
    """One optimizer step over everything; the names of all tensors that it changed, buffers included."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    x = tokens(2, 11)
    model.train()
    model(input_ids=x, labels=x, use_cache=False).loss.backward()
    optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("target", EXPECTED)
def test_exactly_the_named_tensors_train(target) -> None:
    model = randomized(apply_lora(base(), [target], rank=2))
    assert trainable(model) == factors(EXPECTED[target])
    assert step(model) == factors(EXPECTED[target])
    routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
    expected = [m for m in base().modules() if isinstance(m, DeepseekV3TopkRouter)]
    for router, before in zip(routers, expected, strict=True):
        assert torch.equal(router.e_score_correction_bias, before.e_score_correction_bias)


def test_a_new_adapter_changes_nothing_yet() -> None:
    x = tokens(2, 9)
    model = apply_lora(base(), ["all", "router"], rank=2).eval()
    with torch.no_grad():
        assert relative_error(model(input_ids=x).logits, base()(input_ids=x).logits) < 1e-6


def test_layers_are_chosen() -> None:
    for layers, mtp in (([1], False), ([0, 2], False), (range(3), True), ([2], True), (None, True), (None, False)):
        model = apply_lora(base(mtp=2), ["all"], rank=1, layers=layers, mtp=mtp)
        found = {int(name.split("layers.")[1].split(".")[0]) for name in trainable(model)}
        assert found == set(range(3) if layers is None else layers) | ({3, 4} if mtp else set())
    assert trainable(apply_lora(base(), ["all"], rank=1, layers=[1])) == factors(
        {name for name in EXPECTED["all"] if name.startswith("layers.1.")}
    )


def test_layers_by_number_and_not_by_its_last_digit() -> None:
    model = base(num_hidden_layers=12)
    model = apply_lora(model, ["all"], rank=1, layers=[1])
    assert {name.split("layers.")[1].split(".")[0] for name in trainable(model)} == {"1"}


def test_mtp_layers_train_and_their_projection_does_not() -> None:
    model = randomized(apply_lora(base(mtp=1), ["attention", "experts"], rank=2, mtp=True))
    changed = step(model)
    assert changed == trainable(model)
    assert any("layers.3.mlp.experts" in name for name in changed) and not any("eh_proj" in name for name in changed)


def test_without_the_querys_low_rank() -> None:
    model = apply_lora(base(q_lora_rank=None), ["attention"], rank=2)
    names = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert trainable(model) == factors({f"layers.{n}.self_attn.{name}" for n in range(3) for name in names})


def test_rank_and_scale_of_each_set(tmp_path) -> None:
    ranks = {"attention": 2, "dense_mlp": 3, "shared_experts": 4, "experts": 5, "router": 6}
    for alpha, scales in ((None, dict.fromkeys(ranks, 2.0)), (ranks | {"experts": 20}, dict.fromkeys(ranks, 1.0))):
        scales = scales | ({"experts": 4.0} if alpha else {})
        model = apply_lora(base(), list(ranks), rank=ranks, alpha=alpha)
        for target, modules in EXPECTED.items():
            for name in modules if target in ranks else ():
                layer = model.get_submodule("base_model.model.model." + name)
                assert (layer.r["default"], layer.scaling["default"]) == (ranks[target], scales[target])
        randomized(model).save_pretrained(tmp_path)
        with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
            again = PeftModel.from_pretrained(base(), tmp_path)  # PEFT's mistake: they did
        x = tokens(1, 9)
        with torch.no_grad():
            assert relative_error(again(input_ids=x).logits, model.eval()(input_ids=x).logits) < 1e-5
    model = apply_lora(base(), ["all"], rank=4, alpha=4)
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "scaling")
            and isinstance(layer.scaling, dict)} == {1.0}  # fmt: skip


@pytest.mark.parametrize("layers", [None, [1]])
def test_peft_leaves_the_configuration_as_it_is(layers, tmp_path) -> None:
    model = base(num_hidden_layers=8, mtp=1)  # 40 modules of attention: PEFT shortens lists of 20
    config = lora_config(model.config, ["all", "router"], rank=2, layers=layers)
    before = {key: copy.deepcopy(value) for key, value in config.to_dict().items()}
    convert_peft_config_for_transformers(config, model, None)

    def same(found) -> bool:
        keys = ("target_modules", "target_parameters")
        left_out = (*keys, "inference_mode", "peft_version")
        return all(sorted(found[key]) == sorted(before[key]) for key in keys) and all(
            found[key] == value for key, value in before.items() if key not in left_out
        )

    assert same(config.to_dict())
    get_peft_model(model, config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert same(saved) and saved["lora_dropout"] == 0
    loaded = PeftModel.from_pretrained(base(num_hidden_layers=8, mtp=1), tmp_path)
    assert same(loaded.peft_config["default"].to_dict())
    assert not [name for name in loaded.state_dict() if "lora_" in name and "layers.8." in name]


def test_what_pefts_own_names_would_target() -> None:
    """Why the sets exist: PEFT reads these names as the routed experts'."""
    config = plain(lora_config(base().config, ["attention"], rank=2))
    config.layers_to_transform = config.layers_pattern = None
    config.target_modules = {f"mlp.shared_experts.{name}" for name in SWIGLU}
    model = get_peft_model(base(), config)
    assert trainable(model) == factors(EXPECTED["experts"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["experts", "mlp"]}, "targets: found mlp, allowed are attention"),
        ({"targets": "experts"}, "targets: found the string 'experts'"),
        ({"targets": []}, "targets: found .*allowed is at least one"),
        ({"targets": ["dense_mlp"], "layers": [1, 2]}, "targets: found 'dense_mlp', which none of"),
        ({"targets": ["all", "experts"], "layers": [0]}, "targets: found 'experts', which none of"),
        ({"layers": [3]}, r"layers: found \[3\], allowed are the main layers 0 to 2"),
        ({"layers": [-1]}, r"layers: found \[-1\]"),
        ({"mtp": True}, "mtp: found True .*num_nextn_predict_layers=0"),
        ({"rank": {"experts": 3}}, "rank: found values for experts; allowed are those of attention"),
        ({"rank": 0}, r"rank: found \[0\]"),
        ({"targets": ["all"], "alpha": {"attention": 1}}, "alpha: found values for attention; allowed are those of"),
        ({"targets": ["attention", "experts"], "rank": {"attention": 1, "experts": 2}, "alpha": 2}, "alpha: found 2 "),
        ({"task_type": "SEQ2SEQ"}, "task_type: found 'SEQ2SEQ', allowed are CAUSAL_LM"),
        ({"dropout": 1.0}, "dropout: found 1.0"),
        ({"targets": ["router"], "dropout": 0.1}, "dropout: found 0.1 with target 'router', allowed is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        apply_lora(base(), **arguments)


def test_a_set_that_stays_frozen_is_named() -> None:
    """A model that is not built as its configuration says."""
    model = base()
    for layer in model.model.layers[1:]:
        layer.mlp.experts.gate_up = layer.mlp.experts.gate_up_proj
        del layer.mlp.experts.gate_up_proj
    with pytest.raises(ValueError, match="targets: found 'experts', but .*layers.1.mlp.experts.gate_up_proj"):
        apply_lora(model, ["attention", "experts"], rank=2)


@pytest.mark.parametrize("cls", [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification])
def test_classification_heads_train_and_are_saved(cls, tmp_path) -> None:
    model = randomized(apply_lora(base(cls=cls, num_labels=3, pad_token_id=0), ["attention", "experts"], rank=2))
    head = "base_model.model.score.modules_to_save.default."
    names = factors(EXPECTED["attention"] | EXPECTED["experts"])
    heads = {name for name in trainable(model) if name.startswith(head)}
    assert heads and trainable(model) == names | heads
    x = tokens(2, 9)
    model.train()
    labels = torch.tensor([0, 2]) if cls is DeepseekV3ForSequenceClassification else x % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(input_ids=x, labels=labels).loss.backward()
    optimizer.step()
    assert {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])} == names | heads

    model.eval().save_pretrained(tmp_path)
    assert any(name.endswith("score.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))
    expected = model(input_ids=x).logits
    report = report_trainable(model)
    assert report["targets"]["head"]["parameters"] == sum(before[name].numel() for name in heads)
    for load in (load_adapter, PeftModel.from_pretrained):
        fresh = base(cls=cls, num_labels=3, pad_token_id=0)
        nn.init.zeros_(fresh.score.weight)
        assert relative_error(load(fresh, tmp_path).eval()(input_ids=x).logits, expected) < 1e-5
    if cls is DeepseekV3ForSequenceClassification:
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert relative_error(merged(input_ids=x).logits, expected) < 1e-5


def test_report() -> None:
    model = apply_lora(base(), ["attention", "experts"], rank=2)
    report = report_trainable(model)
    experts = 2 * 8 * 2 * ((64 + 64) + (32 + 64))  # layers, experts, rank, in + out of gate_up and of down
    config = model.config
    assert (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts) == (64, 32, 8)
    assert report["targets"]["experts"] == {"tensors": 8, "parameters": experts}
    assert report["targets"].keys() == {"attention", "experts"}
    counts = model.get_nb_trainable_parameters()
    assert (report["trainable"], report["parameters"]) == counts and report["share"] == counts[0] / counts[1]
    assert report["adapter_bytes"] == 4 * counts[0] and report["quantized_byte_fraction"] == 0
    table = trainable_table(report)
    assert f"{experts:,}" in table and f"{counts[1]:,}" in table

    quantized = base()
    quantize_experts(quantized)
    found = report_trainable(apply_lora(quantized, ["attention", "experts"], rank=2))
    assert {key: found[key] for key in ("targets", "trainable", "parameters")} == {
        key: report[key] for key in ("targets", "trainable", "parameters")
    }
    held = 2 * 8 * 3 * 64 * 32
    assert found["quantized_byte_fraction"] == held / (counts[1] - counts[0])  # the fake halves nothing

    whole = report_trainable(base())
    assert whole["share"] == 1 and whole["adapter_bytes"] == 0
    assert whole["targets"]["experts"] == {"tensors": 4, "parameters": held}
    assert whole["targets"].keys() == set(TARGETS) | {"other"}


def test_names_of_sets() -> None:
    config = tiny_config()
    for target, names in target_names(config, ["all", "router"]).items():
        assert {target_of(name) for name in names} == {target}
    assert target_of("model.layers.1.mlp.gate.weight") == "router"
    assert target_of("score.weight") == "head" and target_of("model.norm.weight") == "other"


def test_the_saved_configuration_needs_no_class_of_ours(tmp_path) -> None:
    apply_lora(base(), ["all"], rank=2).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path)._custom_modules is None


def test_layers_may_come_from_an_iterator() -> None:
    assert lora_config(tiny_config(), ("attention",), layers=(n for n in [1])).layers_to_transform == [1]


def test_a_model_with_adapters_is_refused() -> None:
    model = apply_lora(base())
    for given in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="model: found one with adapters"):
            apply_lora(given)
