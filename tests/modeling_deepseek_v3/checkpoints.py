"""Checkpoints on disk for the tests: official tensors and files, written without help of the code under test."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
PEAK = """
import sys, threading, time
from pathlib import Path
from deepseek_v3 import DeepseekV3ForCausalLM

def memory():  # without the pages of mapped files, which the system takes back when it needs them
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

DeepseekV3ForCausalLM.from_pretrained(sys.argv[1])
samples = [memory()]
done = threading.Event()

def watch():
    while not done.wait(0.001):
        samples.append(memory())

thread = threading.Thread(target=watch)
thread.start()
model = DeepseekV3ForCausalLM.from_pretrained(sys.argv[2])
done.set()
thread.join()
print(max(samples) - samples[0])
print(sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()))
"""


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def official_tensors(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of DeepSeek's files, without help of the code under test."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        prefix, dot, fused = name.partition(".experts.")
        if not dot:
            tensors[name] = tensor.clone()
            continue
        for expert in range(config.n_routed_experts):
            parts = tensor[expert].chunk(2) if fused == "gate_up_proj" else [tensor[expert]]
            kinds = ["gate_proj", "up_proj"] if fused == "gate_up_proj" else ["down_proj"]
            for kind, part in zip(kinds, parts, strict=True):
                tensors[f"{prefix}.experts.{expert}.{kind}.weight"] = part.clone()
    for k in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + k}"
        tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def write_official(folder: Path, config: DeepseekV3Config, tensors: dict[str, torch.Tensor], shards: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    if not shards:
        save_file(tensors, folder / SINGLE)
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors"  # DeepSeek's own numbering
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_state(found: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def is_quantized(name: str) -> bool:
    """DeepSeek's choice: the projections; not the router, norms, embedding, head and eh_proj."""
    return name.endswith("_proj.weight") and not name.endswith("eh_proj.weight") or "kv_a_proj_with_mqa" in name
