"""Hostile Llama checkpoints as the source of a conversion: transformers' own loader would take them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3.conversion import load_source
from tests.conversion.helpers import tiny_llama
from tests.security.conftest import edit
from tests.security.limits import assert_cheap, assert_refused, limited

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny_llama(vocab_size=600).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    return folder


@pytest.fixture
def llama(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_the_whole_source_loads(whole) -> None:
    model, tokenizer = load_source(whole)
    assert model.config.model_type == "llama" and len(tokenizer) == 600
    assert_cheap(limited(lambda: load_source(whole)))


CONFIGS = {
    "architecture": ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "model_type: found 'evil'"),
    "of this package": ({"model_type": "deepseek_v3"}, "model_type: found 'deepseek_v3', allowed 'llama'"),
    "kernel": ({"attn_implementation": "evil/kernel"}, "attn_implementation: found 'evil/kernel'"),
    "quantized": ({"quantization_config": {"quant_method": "torchao"}}, "quantization_config: found one"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, allowed are 1 to 512"),
    "more layers": ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing"),
    "vocabulary": ({"vocab_size": 10**9}, "model.embed_tokens.weight is [600, 48] in model.safetensors"),
    "width": ({"hidden_size": 2**40, "head_dim": 2**38}, "config.json"),
    "width is text": ({"hidden_size": "abc"}, "config.json"),
    "heads": ({"num_attention_heads": 0}, "config.json"),
    "activation": ({"hidden_act": "evil"}, "config.json"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_is_refused(name: str, llama) -> None:
    values, message = CONFIGS[name]
    edit(llama / "config.json", **values)
    assert_refused(limited(lambda: load_source(llama)), message)


def rename(tensors: dict) -> None:
    tensors["evil"] = tensors.pop("model.norm.weight")


def shorten(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()


@pytest.mark.parametrize("change", [rename, shorten])
def test_tensors_that_do_not_fit_are_refused(change, llama) -> None:
    tensors = load_file(llama / SINGLE)
    change(tensors)
    save_file(tensors, llama / SINGLE)
    assert_refused(limited(lambda: load_source(llama)), llama)


def test_files_beyond_the_folder_are_refused(llama) -> None:
    (llama / SINGLE).rename(llama.parent / "secret.safetensors")
    names = load_file(llama.parent / "secret.safetensors")
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../secret.safetensors")}))
    assert_refused(limited(lambda: load_source(llama)), llama / INDEX, "leaves the model folder")


def test_pickles_and_truncated_files_are_refused(llama) -> None:
    (llama / SINGLE).write_bytes((llama / SINGLE).read_bytes()[:-1])
    assert_refused(limited(lambda: load_source(llama)), llama / SINGLE)
    (llama / SINGLE).unlink()

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {llama}/ran",)

    torch.save({"a": Runs()}, llama / "pytorch_model.bin")
    assert_refused(limited(lambda: load_source(llama)), llama, "only safetensors are read")
    assert not (llama / "ran").exists()


def test_hostile_tokenizer_is_refused(llama) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(llama / "tokenizer.json", pre_tokenizer=split)
    assert_refused(limited(lambda: load_source(llama)), llama / "tokenizer.json", "unknown pattern")
    (llama / "tokenizer.json").unlink()
    outcome = limited(lambda: load_source(llama))
    assert not outcome.loaded and outcome.classes != ["Timeout"], str(outcome)
