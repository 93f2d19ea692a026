"""Logits against DeepSeek's published inference code (github.com/deepseek-ai/DeepSeek-V3, inference/model.py).

`data/deepseek_reference.json` holds what that code computed on a CPU in fp32 for the weights that `weight` gives:
its commit, the prompts, and the logits after every token of a prompt. The settings: `max_seq_len` 64 above
`original_seq_len` 16, so YaRN and its softmax scale are on; a routing bias in every MoE layer (that code has one only
at `dim` 7168); both of its attention forms, naive and absorbed, which agreed to 3e-6.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from deepseek_v3.modeling_deepseek_v3 import tensor_shapes
from tests.modeling_deepseek_v3.helpers import relative_error

GOLDEN = json.loads((Path(__file__).parent / "data" / "deepseek_reference.json").read_text())
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 12,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
VARIANTS = {"v3": {}, "one group, no q_lora": {"n_group": 1, "topk_group": 1, "q_lora_rank": None}}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers, seeded by the tensor's name and scaled by its kind.

    NumPy's `RandomState` is the generator whose numbers are promised never to change.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    noise = torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("e_score_correction_bias"):
        return 0.2 * noise
    return noise if "embed" in name else noise * shape[-1] ** -0.5


def official_weights(config: DeepseekV3Config) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(config, mtp=False) | {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    return {name: weight(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request, tmp_path_factory):
    config = DeepseekV3Config(**{**SIZES, **VARIANTS[request.param]})
    folder = tmp_path_factory.mktemp("reference")
    config.save_pretrained(folder)
    save_file(official_weights(config), folder / "model.safetensors")
    golden = GOLDEN["variants"][request.param]
    return folder, torch.tensor(golden["input_ids"]), torch.tensor(golden["logits"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["deepseek_v3", "eager"])
def test_logits_after_every_token(attention: str, experts: str, reference) -> None:
    folder, input_ids, logits = reference
    arguments = {"attn_implementation": attention, "experts_implementation": experts}
    model = DeepseekV3ForCausalLM.from_pretrained(folder, **arguments)
    assert logits.shape == (1, 24, 64) and logits.std() > 0.5
    with torch.no_grad():
        assert relative_error(model(input_ids).logits, logits) < 1e-5


def test_logits_of_cached_decoding(reference) -> None:
    """One token at a time, which takes the absorbed form."""
    folder, input_ids, logits = reference
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    cache, found = None, []
    with torch.no_grad():
        for position in range(input_ids.shape[1]):
            output = model(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert relative_error(torch.cat(found, dim=1), logits) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"rope_interleave": False},
        {"rope_parameters": {**SIZES["rope_parameters"], "mscale_all_dim": 0.0}},
        {"rope_parameters": {**SIZES["rope_parameters"], "factor": 3.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.4},
        {"first_k_dense_replace": 1, "topk_group": 4, "n_group": 4},
    ],
)
def test_the_reference_sees_every_setting(change: dict, tmp_path) -> None:
    """Otherwise the comparison above would prove less than it says."""
    config = DeepseekV3Config(**{**SIZES, **change})
    model = DeepseekV3ForCausalLM(config).eval()
    fused = official_weights(config)
    for name, parameter in model.state_dict().items():
        if ".experts." not in name:
            parameter.copy_(fused[name])
            continue
        prefix, kind = name.split(".experts.")
        for expert in range(config.n_routed_experts):
            kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            parameter[expert].copy_(torch.cat([fused[f"{prefix}.experts.{expert}.{kind}.weight"] for kind in kinds]))
    golden = GOLDEN["variants"]["v3"]
    with torch.no_grad():
        logits = model(torch.tensor(golden["input_ids"])).logits
    assert relative_error(logits, torch.tensor(golden["logits"])) > 1e-3
