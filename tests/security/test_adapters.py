"""Hostile adapters: what PEFT takes as it comes, refused by field before PEFT sees it."""

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from deepseek_v3.configuration.adapter_file import read_adapter_config
from deepseek_v3.export.source import Source
from deepseek_v3.finetuning import load_adapter
from tests.modeling_deepseek_v3.helpers import relative_error, tokens
from tests.security import limits
from tests.security.conftest import edit
from tests.security.limits import assert_refused, limited, measured

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOMB = "(.+)+x$"
VALUES = {
    "auto_mapping": ({"parent_library": "evil", "base_model_class": "X"}, "auto_mapping: found {'parent_library'"),
    "peft_type": ("NOPE", "peft_type: found 'NOPE', allowed 'LORA'"),
    "peft_type is a list": ([], "peft_type: found []"),
    "peft_type of prompts": ("PROMPT_TUNING", "peft_type: found 'PROMPT_TUNING'"),
    "target_modules": (BOMB, "target_modules: found '(.+)+x$', allowed no pattern with a repeated group"),
    "target_modules is broken": ("(", "not a regular expression"),
    "target_modules is a number": (5, "target_modules: found 5"),
    "target_modules by the thousand": (["q_proj"] * 20_000, "target_modules: found"),
    "target_modules, pattern in a list": ([BOMB], "target_modules: found"),
    "target_modules, many patterns": ([f".*x{i}" for i in range(65)], "allowed at most 64 patterns"),
    "target_modules is an object": ({"q_proj": 1}, "target_modules: found {'q_proj': 1}"),
    "target_parameters": (["x" * 5000 + "$"], "target_parameters: found"),
    "target_parameters is text": ("experts", "target_parameters: found 'experts', allowed a list"),
    "exclude_modules": (BOMB, "exclude_modules: found"),
    "rank_pattern": ({BOMB: 4}, "rank_pattern: found"),
    "rank_pattern is a list": ([1], "rank_pattern: found [1]"),
    "rank_pattern, rank": ({"q_proj": 10**9}, "rank_pattern: found"),
    "alpha_pattern": ({"(": 4}, "alpha_pattern: found"),
    "layers_pattern": (BOMB, "layers_pattern: found"),
    "modules_to_save": ([BOMB], "modules_to_save: found"),
    "r": (10**7, "r: found 10000000, allowed an integer from 1 to 1024"),
    "r is negative": (-1, "r: found -1"),
    "r is text": ("8", "r: found '8'"),
    "r is true": (True, "r: found True"),
    "lora_alpha": (float("nan"), "lora_alpha: found nan"),
    "lora_alpha is text": ("x", "lora_alpha: found 'x'"),
    "lora_dropout": (5, "lora_dropout: found 5"),
    "layers_to_transform": ([0] * 10**5, "layers_to_transform: found"),
    "layers_to_transform, far": (10**9, "layers_to_transform: found 1000000000"),
    "layer_replication": ([[0, 3]] * 1000, "layer_replication: found"),
    "megatron_config": ({"x": 1}, "megatron_config: found"),
    "trainable_token_indices": ([10**9], "trainable_token_indices: found"),
    "loftq_config": ({"x": 1}, "loftq_config: found"),
    "init_lora_weights": ("pissa_niter_1000000", "init_lora_weights: found"),
    "init_lora_weights is a number": (7, "init_lora_weights: found 7"),
    "use_dora": (True, "use_dora: found True"),
    "bias": ("all", "bias: found 'all'"),
    "task_type": ("EVIL", "task_type: found 'EVIL'"),
    "base_model_name_or_path": (7, "base_model_name_or_path: found 7"),
    "revision": (["x"], "revision: found ['x']"),
    "tokenizer_kwargs": ({"trust_remote_code": True}, "tokenizer_kwargs: found"),
    "self": (1, "self: found 1"),
    "fan_in_fan_out": (True, "fan_in_fan_out: found True"),
    "corda_config": ({"a": 1}, "corda_config: found"),
}
TEXTS = ["", "{", "[]", "[" * 100_000, '{"peft_type": "LORA"}', "{}", '{"a": [' + "[]," * 1_500_000 + "[]]}"]


def set_value(folder: Path, name: str) -> Path:
    return edit(folder / CONFIG, **{name.split(" ")[0].rstrip(","): VALUES[name][0]})


@pytest.mark.parametrize("name", VALUES)
def test_configuration_is_refused_by_field(name: str, adapter_folder) -> None:
    file = set_value(adapter_folder, name)
    assert_refused(measured(lambda: read_adapter_config(adapter_folder)), file, VALUES[name][1])


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_unreadable_configuration_names_the_file(number: int, adapter_folder) -> None:
    (adapter_folder / CONFIG).write_text(TEXTS[number])
    assert_refused(measured(lambda: read_adapter_config(adapter_folder)), adapter_folder / CONFIG)


def test_an_adapter_of_ours_and_of_peft_is_read(adapter, tmp_path) -> None:
    config = read_adapter_config(adapter)
    saved = LoraConfig.from_pretrained(str(adapter))
    assert LoraConfig(**config).to_dict() == saved.to_dict() | {"auto_mapping": None}
    plain = LoraConfig(r=8, target_modules=r".*\.(q_b_proj|o_proj)", rank_pattern={r"layers\.\d+\.self_attn": 4})
    plain.save_pretrained(tmp_path)
    assert LoraConfig(**read_adapter_config(tmp_path)).target_modules == plain.target_modules


# PEFT alone needs more than the limits for these
HANGING = ["r", "rank_pattern"]
FAILING = ["peft_type", "peft_type is a list", "r is text", "rank_pattern is a list", "alpha_pattern", "lora_alpha"]


@pytest.mark.parametrize("name", [*HANGING, *FAILING, "auto_mapping", "layers_to_transform, far"])
def test_load_adapter_refuses_the_configuration(name: str, base, adapter_folder, monkeypatch) -> None:
    monkeypatch.setattr(limits, "WALL_SECONDS", 1.5)
    file = set_value(adapter_folder, name)
    assert_refused(limited(lambda: load_adapter(base, adapter_folder)), file, VALUES[name][1])


def change(folder: Path, edit_tensors) -> Path:
    tensors = load_file(folder / WEIGHTS)
    edit_tensors(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder / WEIGHTS


def shorten(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:1].clone()


WEIGHT_EDITS = {
    "another shape": shorten,
    "one missing": lambda tensors: tensors.pop(next(iter(tensors))),
    "none": lambda tensors: tensors.clear(),
    "one more": lambda tensors: tensors.update({"base_model.model.x.y": torch.ones(2)}),
    "integers": lambda tensors: tensors.update({k: v.to(torch.int8) for k, v in tensors.items()}),
}


@pytest.mark.parametrize("name", WEIGHT_EDITS)
def test_load_adapter_refuses_tensors_that_do_not_fit(name: str, base, adapter_folder) -> None:
    file = change(adapter_folder, WEIGHT_EDITS[name])
    assert_refused(limited(lambda: load_adapter(base, adapter_folder)), file)


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


BROKEN = {
    "seven bytes": lambda file: file.write_bytes(b"1234567"),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "absent": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["seven bytes", "truncated"])
def test_load_adapter_refuses_broken_files(name: str, base, adapter_folder) -> None:
    BROKEN[name](adapter_folder / WEIGHTS)
    assert_refused(limited(lambda: load_adapter(base, adapter_folder)), adapter_folder)


def test_a_pickled_adapter_does_not_run(base, adapter_folder) -> None:
    (adapter_folder / WEIGHTS).unlink()
    torch.save({"a": Runs(f"touch {adapter_folder}/ran")}, adapter_folder / "adapter_model.bin")
    for load in (lambda: load_adapter(base, adapter_folder), lambda: Source(adapter_folder)):
        outcome = limited(load)
        assert not outcome.loaded and not (adapter_folder / "ran").exists(), str(outcome)


def test_a_pickled_adapter_is_refused(base, adapter_folder) -> None:
    (adapter_folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(2)}, adapter_folder / "adapter_model.bin")
    assert_refused(limited(lambda: load_adapter(base, adapter_folder)), adapter_folder, "safetensors")


PLAIN = [
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": ["q_b_proj", "gate_proj", "up_proj", "down_proj"]},
    {"target_modules": ["o_proj", "lm_head"], "rank_pattern": {"o_proj": 3}},
    {"target_modules": ["kv_b_proj", "embed_tokens"], "modules_to_save": ["lm_head", "kv_a_layernorm"]},
]


@pytest.mark.parametrize("arguments", PLAIN, ids=str)
@torch.no_grad()
def test_what_plain_peft_saves_is_loaded(arguments: dict, checkpoint, tmp_path) -> None:
    def stock() -> torch.nn.Module:
        return StockForCausalLM.from_pretrained(checkpoint, num_nextn_predict_layers=0).eval()

    theirs = get_peft_model(stock(), LoraConfig(r=2, task_type="CAUSAL_LM", **arguments)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name or "embedding_B" in name:
            parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / CONFIG, base_model_name_or_path="someone/elses")
    loaded = load_adapter(stock(), tmp_path)
    assert relative_error(loaded(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits) < 1e-5
    assert loaded.peft_config["default"].base_model_name_or_path == "someone/elses"


# --- merged by an export -------------------------------------------------------------------------------------------

EXPORTED = [
    name for name in VALUES if name.split(" ")[0].rstrip(",") in ("peft_type", "r", "bias", "use_dora", "lora_alpha")
]
EXPORTED += ["rank_pattern", "rank_pattern is a list", "alpha_pattern", "init_lora_weights", "target_parameters"]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_refuses_the_configuration(name: str, checkpoint, adapter_folder) -> None:
    file = set_value(adapter_folder, name)
    assert_refused(limited(lambda: Source(checkpoint, adapter_folder)), file)


@pytest.mark.parametrize("name", [*WEIGHT_EDITS, *BROKEN])
def test_an_export_refuses_the_weights(name: str, checkpoint, adapter_folder) -> None:
    if name in BROKEN:
        BROKEN[name](adapter_folder / WEIGHTS)
    else:
        change(adapter_folder, WEIGHT_EDITS[name])
    assert_refused(limited(lambda: Source(checkpoint, adapter_folder)), adapter_folder)


@pytest.mark.parametrize("value", ["/nonexistent", "../model", 7, None, "evil/repo", "\0"], ids=str)
def test_the_base_that_an_adapter_names(value, adapter_folder) -> None:
    """Nothing is downloaded for an export; the Auto class asks the Hub, as for any name."""
    edit(adapter_folder / CONFIG, base_model_name_or_path=value)
    assert_refused(limited(lambda: Source(adapter_folder)), adapter_folder / CONFIG, "base_model_name_or_path")
    outcome = limited(lambda: AutoModelForCausalLM.from_pretrained(adapter_folder))
    assert not outcome.loaded and outcome.classes != ["Timeout"], str(outcome)


def test_an_adapter_that_names_itself_as_its_base(adapter_folder) -> None:
    edit(adapter_folder / CONFIG, base_model_name_or_path=str(adapter_folder))
    assert_refused(limited(lambda: Source(adapter_folder)), adapter_folder / CONFIG)
