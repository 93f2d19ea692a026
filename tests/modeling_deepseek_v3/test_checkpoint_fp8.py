"""FP8 blocks of a checkpoint: dequantized exactly, and what must be refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from tests.modeling_deepseek_v3.checkpoints import (
    QUANTIZATION,
    assert_same_state,
    change_tensors,
    is_quantized,
    official_tensors,
    saved_tensors,
    write_official,
)
from tests.modeling_deepseek_v3.helpers import build, tiny_config, tokens

FP8_CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,  # kv_a_proj_with_mqa has 576 rows: 4.5 blocks
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}


def quantize(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, ...]:
    """E4M3 codes, one scale per block, and what they stand for, block by block."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = (codes[part].float() * scales[i, j]).bfloat16()
    return codes, scales, meant


def fp8_checkpoint(folder: Path, shards: int = 0, block: tuple[int, int] = (128, 128)):
    """An FP8 checkpoint in `folder`; returns the bf16 tensors it stands for."""
    model = build(tiny_config(**FP8_CONFIG)).bfloat16()
    stored, meant = {}, {}
    for name, tensor in official_tensors(model).items():
        if is_quantized(name):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantize(tensor, block)
        else:
            stored[name] = meant[name] = tensor
    assert sum(name.endswith("_scale_inv") for name in stored) == 5 * 3 + 3 + 2 * 3 * (4 + 1)
    assert "model.layers.2.self_attn.o_proj.weight_scale_inv" in stored  # the MTP layer
    model.config.dtype = torch.bfloat16
    write_official(folder, model.config, stored, shards)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**QUANTIZATION, "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("shards, block", [(0, (128, 128)), (3, (128, 128)), (0, (64, 32))])
def test_fp8_blocks_are_dequantized_exactly(shards: int, block: tuple[int, int], tmp_path) -> None:
    meant = fp8_checkpoint(tmp_path / "fp8", shards, block)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    found = official_tensors(loaded)
    assert set(found) == set(meant)
    for name, tensor in meant.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert getattr(loaded.config, "quantization_config", None) is None
    loaded(tokens(1, 5))

    loaded.save_pretrained(tmp_path / "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16")
    assert_same_state(again, loaded.state_dict())


def test_fp8_files_are_read_anew_by_each_load(tmp_path) -> None:
    for block in ((128, 128), (64, 32)):
        meant = fp8_checkpoint(tmp_path / "fp8", block=block)  # rounded differently
        weight = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8").model.layers[0].self_attn.o_proj.weight
        assert torch.equal(weight, meant["model.layers.0.self_attn.o_proj.weight"].to(weight.dtype))
        shutil.rmtree(tmp_path / "fp8")


def test_fp8_blocks_load_in_another_dtype_and_into_other_heads(tmp_path) -> None:
    meant = fp8_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, num_nextn_predict_layers=0)
    stored = saved_tensors(tmp_path)
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :192]
    assert torch.equal(loaded.get_parameter(name), stored[name].float() * scale) and loaded.mtp_layers == []
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.get_parameter(name.removeprefix("model.")), meant[name])
    classifier = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.get_parameter(name), meant[name]) and classifier.score.out_features == 3


KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{KV_A}_scale_inv"), f"{KV_A} is F8_E4M3 without"),
        (lambda t: t.update({KV_A: t[KV_A].bfloat16()}), f"{KV_A} is BF16 with"),
        (lambda t: t.update({f"{KV_A}_scale_inv": t[f"{KV_A}_scale_inv"][:4]}), r"is \[4, 2\] in .* needs \[5, 2\]"),
        (lambda t: t.pop(KV_A), f"1 missing: {KV_A}"),
        (lambda t: t.update({"model.layers.0.other.weight_scale_inv": torch.ones(1, 1)}), "unexpected: .*other"),
    ],
)
def test_broken_fp8_files_are_refused(change, message: str, tmp_path) -> None:
    fp8_checkpoint(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("block", [None, 128, [128], [128, 0], [128, 128.0], "128x128"])
def test_fp8_block_size_is_checked(block, tmp_path) -> None:
    fp8_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_block_size"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
