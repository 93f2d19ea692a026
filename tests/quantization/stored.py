"""Quantized checkpoints as their makers lay them out, written without help of the package, and what they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepseek_v3 import DeepseekV3ForCausalLM
from tests.modeling_deepseek_v3.helpers import build, tiny_config

Tensors = dict[str, torch.Tensor]
SIZES = {  # inputs of every layer are multiples of 32, the smallest group; fp8 and NF4 get blocks that are cut off
    "hidden_size": 160,
    "intermediate_size": 224,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in name


def fp8(weight: torch.Tensor, block: int = 128) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek's blocks, one after the other."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // block), -(-weight.shape[1] // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = codes[part].float() * scales[i, j]
    return {".weight": codes, ".weight_scale_inv": scales}, meant


def int4(weight: torch.Tensor, group: int = 32) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' pack-quantized: eight values to a word, the first in its lowest bits, 8 added to each."""
    out, width = weight.shape
    groups = weight.float().view(out, width // group, group)
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    meant = (values * scale.float()[..., None]).view(out, width)
    words = torch.zeros(out, width // 8, dtype=torch.int64)
    for position in range(8):
        words |= (values.view(out, width // 8, 8)[..., position].long() + 8) << (4 * position)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = torch.tensor([out, width], dtype=torch.int64)
    return {".weight_packed": words, ".weight_scale": scale, ".weight_shape": shape}, meant


def int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-127, 127)
    return {".weight": codes.to(torch.int8), ".weight_scale": scale}, codes * scale.float()


def nf4(weight: torch.Tensor, double: bool = True) -> tuple[Tensors, torch.Tensor]:
    """By bitsandbytes itself, whose own layer saves these."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    stored = {".weight": packed} | {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    if double:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        absmax = state.absmax
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: weight.numel()].int()
    values = state.code[codes] * absmax.repeat_interleave(64)[: weight.numel()]
    return stored, values.view(weight.shape)


def llm_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    from bitsandbytes import functional

    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    stored = {".weight": codes, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes.float() * largest[:, None] / 127


def _compressed(bits: int, ignore: list[str], targets: list[str] | None = None) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": 32} if bits == 4 else {"strategy": "channel", "group_size": None}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None, **strategy}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    name = "pack-quantized" if bits == 4 else "int-quantized"
    group = {"weights": weights, "input_activations": inputs if bits == 8 else None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": targets or ["Linear"], "format": name, **group}},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}
LLM_INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PLAIN = ["lm_head", "re:.*eh_proj$", "re:.*mlp\\.gate$"]

# format -> how a weight is stored, and the configuration
FORMATS: dict[str, tuple[Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "fp8": (fp8, FP8),
    "int4": (int4, _compressed(4, PLAIN)),
    "int8": (int8, _compressed(8, PLAIN)),
    "nf4": (nf4, NF4),
    "nf4-single": (lambda weight: nf4(weight, False), {**NF4, "bnb_4bit_use_double_quant": False}),
    "bnb-int8": (llm_int8, LLM_INT8),
    "int4-experts": (int4, _compressed(4, [], ["re:.*\\.experts\\.\\d+\\."])),
    "int8-experts": (int8, _compressed(8, [*PLAIN, "re:.*self_attn", "re:.*mlp\\.(gate|up|down)_", "re:.*shared_"])),
}
ROUTED_ONLY = ("int4-experts", "int8-experts")


def write(
    folder: Path, name: str, model: DeepseekV3ForCausalLM | None = None, shards: int = 0, **sizes: Any
) -> tuple[Path, Tensors]:
    """A checkpoint in this format, in the folder; and the tensors that it stands for, in fp32 where quantized."""
    model = build(tiny_config(**{**SIZES, **sizes})) if model is None else model
    model = model.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, max_shard_size="10GB")
    quantize, config = FORMATS[name]
    stored: Tensors = {}
    meant: Tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if is_linear(key) and (name not in ROUTED_ONLY or ".experts." in key):
            parts, meant[key] = quantize(tensor)
            stored |= {f"{key.removesuffix('.weight')}{suffix}": part for suffix, part in parts.items()}
        else:
            stored[key] = meant[key] = tensor
    save(folder, stored, shards)
    set_config(folder, config)
    return folder, meant


def save(folder: Path, tensors: Tensors, shards: int = 0) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink(missing_ok=True)
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
