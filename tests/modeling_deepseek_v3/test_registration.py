"""`import deepseek_v3` makes the Auto classes use this package, cheaply, and leaves stock's own names alone."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model
from tests.modeling_deepseek_v3.helpers import build, relative_error, run_python, stock_config, stock_twin, tokens

FIRST = {
    "deepseek_v3 first": "import deepseek_v3, transformers",
    "transformers first": "import transformers; import deepseek_v3",
    # the mappings exist, and stock's classes have been resolved and cached
    "auto classes used first": """
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", num_hidden_layers=1, hidden_size=8,
    intermediate_size=8, moe_intermediate_size=8, vocab_size=8, n_routed_experts=8, num_attention_heads=1))
assert type(stock).__module__.startswith("transformers.")
import deepseek_v3
""",
}
CHECK = """
import json, sys
from transformers import AutoConfig
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
found = {"AutoConfig": type(config)}
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
             "AutoModelForTokenClassification"):
    auto = getattr(transformers, name)
    found[name] = type(auto.from_pretrained(folder))
    assert type(auto.from_config(config)) is found[name]
for name, cls in found.items():
    assert cls.__module__.startswith("deepseek_v3."), (name, cls)
    assert cls is getattr(deepseek_v3, cls.__name__), (name, cls)
    assert cls.model_type == "deepseek_v3" if name == "AutoConfig" else cls.config_class is found["AutoConfig"]
assert type(AutoConfig.for_model("deepseek_v3")) is found["AutoConfig"]
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
for cls in (DeepseekV3Config, DeepseekV3ForCausalLM):
    assert cls.__module__.startswith("transformers.models.deepseek_v3."), cls
# other architectures stay what they are
other = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("deepseek_v2", num_hidden_layers=1,
    hidden_size=8, intermediate_size=8, moe_intermediate_size=8, vocab_size=8, num_attention_heads=1))
assert type(other).__module__.startswith("transformers."), type(other)
print(json.dumps({name: cls.__name__ for name, cls in found.items()}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", FIRST)
def test_auto_classes_give_ours_in_every_import_order(order: str, saved) -> None:
    assert eval(run_python(FIRST[order] + CHECK, saved).splitlines()[-1]) == {
        "AutoConfig": "DeepseekV3Config",
        "AutoModel": "DeepseekV3Model",
        "AutoModelForCausalLM": "DeepseekV3ForCausalLM",
        "AutoModelForSequenceClassification": "DeepseekV3ForSequenceClassification",
        "AutoModelForTokenClassification": "DeepseekV3ForTokenClassification",
    }


def test_import_loads_no_heavy_library() -> None:
    """Nor does asking for the names; the finder that waits for transformers is entered once."""
    program = """
import sys, deepseek_v3
dir(deepseek_v3)
import importlib
importlib.reload(deepseek_v3)
heavy = {name.split(".")[0] for name in sys.modules}
heavy &= {"torch", "transformers", "triton", "peft", "accelerate", "numpy", "safetensors", "huggingface_hub"}
print(sorted(heavy), sum("deepseek_v3" in type(finder).__module__ for finder in sys.meta_path))
"""
    assert run_python(program).strip() == "[] 1"


def test_stock_classes_keep_their_names_in_this_process() -> None:
    import transformers

    assert transformers.DeepseekV3ForCausalLM.__module__.startswith("transformers.models.deepseek_v3.")
    assert transformers.DeepseekV3ForCausalLM is not DeepseekV3ForCausalLM
    assert DeepseekV3ForCausalLM.__module__.startswith("deepseek_v3.")


def test_a_stock_configuration_builds_our_model() -> None:
    model = build()
    stock = stock_config(model.config)
    assert type(stock) is StockConfig
    stock._attn_implementation, stock._experts_implementation = "eager", "batched_mm"
    ours = DeepseekV3ForCausalLM(stock)
    assert type(ours.config) is DeepseekV3Config and type(ours.model.config) is DeepseekV3Config
    assert (ours.config._attn_implementation, ours.config._experts_implementation) == ("eager", "batched_mm")
    assert len(ours.mtp_layers) == 1 and ours.config.mtp_loss_coef == 0.3
    ours.load_state_dict(model.state_dict())
    rows = tokens(1, 8)
    with torch.no_grad():
        assert relative_error(ours.eval()(rows).logits, stock_twin(model)(rows).logits) < 3e-6


def test_a_stock_configuration_loads_our_files(saved) -> None:
    stock = StockConfig.from_pretrained(saved)
    loaded = DeepseekV3ForCausalLM.from_pretrained(saved, config=stock, attn_implementation="eager")
    assert type(loaded.config) is DeepseekV3Config
    assert (loaded.config._attn_implementation, loaded.config._experts_implementation) == ("eager", "deepseek_v3")
    assert torch.equal(loaded.lm_head.weight, build().lm_head.weight)


def test_our_configuration_builds_the_stock_model(saved) -> None:
    """Tools import the stock class by name and hand it whatever AutoConfig gave them."""
    from transformers import DeepseekV3ForCausalLM as StockForCausalLM

    stock = StockForCausalLM(DeepseekV3Config.from_pretrained(saved))
    with torch.no_grad():
        assert stock(tokens(1, 4)).logits.shape == (1, 4, 97)


def test_from_config_builds_ours_with_the_arguments(saved) -> None:
    from transformers import AutoModel

    config = DeepseekV3Config.from_pretrained(saved)
    model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is DeepseekV3Model and model.dtype == torch.bfloat16
    assert model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_package_names_are_the_ones_of_the_rooms() -> None:
    import deepseek_v3

    for name in deepseek_v3.__all__:
        assert getattr(deepseek_v3, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        deepseek_v3.Nonsense  # noqa: B018
    assert sys.modules["deepseek_v3"].registration.MODEL_TYPE == DeepseekV3Config.model_type
