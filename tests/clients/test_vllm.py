"""vLLM, in an environment of its own on a CPU, loads our exports and agrees with our model on the same weights.

Its attention there takes fp32 and latents of 512 + 64. Its kernels for FP8, INT4 and INT8 take no fp32, so that those
exports are loaded as they are in bf16, and once more in fp32 as the plain checkpoint that our reader makes of them.
In bf16 a token near the edge between two experts goes to another one; a model that uses all of them has no such edge,
so that what is left is rounding.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset
from deepseek_v3.evaluation.speed import mtp_acceptance
from deepseek_v3.export import Source, export
from tests.clients.environments import run_client
from tests.modeling_deepseek_v3.helpers import randomize

pytestmark = pytest.mark.slow

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SIZES = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128},
    **{"q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
}
NEW = 24
STEPS = 150


def write_model(folder: Path, **overrides: Any) -> Path:
    randomize(DeepseekV3ForCausalLM(preset("tiny", **SIZES, **overrides))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vllm") / "model", rope_parameters=YARN)


@pytest.fixture(scope="module")
def dense_routing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    every = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}
    return write_model(tmp_path_factory.mktemp("vllm") / "dense", rope_parameters=YARN, **every)


def prompts() -> torch.Tensor:
    return torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(1))


def counting(start: torch.Tensor, step: torch.Tensor, length: int) -> torch.Tensor:
    """Rows `start + step i` modulo 61, as token ids."""
    return (start + step * torch.arange(length)) % 61 + 2


def score(
    folder: Path, tmp_path: Path, ids: torch.Tensor | None = None, dtype: str = "float32", **chosen: bool
) -> dict[str, Any]:
    rows = (prompts() if ids is None else ids).tolist()
    request = {"model": str(folder), "prompts": rows, "new": NEW, "dtype": dtype}
    request |= {"mtp": False, "routing": False, "rope": False} | chosen
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("vllm_score.py")
    result = json.loads(run_client("vllm", script, str(tmp_path / "request.json")).splitlines()[-1])
    assert result["foreign"] == []
    return result


def dequantized(folder: Path) -> DeepseekV3ForCausalLM:
    """Our model in fp32 with the export's weights as plain matrices."""
    source = Source(folder)
    state_dict = {name: source.read(name).float() for name in source.names}
    options = {"config": source.config, "state_dict": state_dict, "dtype": torch.float32}
    return DeepseekV3ForCausalLM.from_pretrained(None, **options).eval()


def compare(result: dict[str, Any], ours: DeepseekV3ForCausalLM) -> tuple[float, float]:
    """Largest difference of a logprob, and the share of positions with the same top prediction."""
    expected, found = logprobs(ours), torch.tensor(result["logprobs"])
    same = found.argmax(-1) == expected.argmax(-1)
    return float((found - expected).abs().max()), float(same.float().mean())


@torch.no_grad()
def logprobs(ours: DeepseekV3ForCausalLM) -> torch.Tensor:
    return ours(prompts()).logits[:, :-1].log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(expected || found) of logprobs, nats per token."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def greedy(ours: DeepseekV3ForCausalLM, ids: torch.Tensor | None = None) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    ids = prompts() if ids is None else ids
    return ours.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()


def test_bf16_in_fp32(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "bf16", "bf16", progress=False)
    result, ours = score(tmp_path / "bf16", tmp_path), dequantized(tmp_path / "bf16")
    error, same = compare(result, ours)
    assert error < 1e-4 and same == 1
    assert result["tokens"] == greedy(ours)


def test_plain_rope_in_fp32(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    result, ours = score(folder, tmp_path, rope=True), dequantized(folder)
    error, same = compare(result, ours)
    assert error < 1e-4 and same == 1
    assert result["tokens"] == greedy(ours)


QUANTIZED: dict[str, tuple[str, dict[str, str]]] = {
    "fp8": ("fp8", {}),
    "int4": ("int4", {"method": "rtn"}),
    "int8-experts": ("int8", {"targets": "experts"}),
    "int8-linears": ("int8", {"targets": "linears"}),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_in_fp32(name: str, model: Path, tmp_path: Path) -> None:
    form, options = QUANTIZED[name]
    export(model, tmp_path / "packed", form, progress=False, **options)
    export(tmp_path / "packed", tmp_path / "plain", "bf16", dtype="fp32", progress=False)
    result, ours = score(tmp_path / "plain", tmp_path), dequantized(tmp_path / "packed")
    error, same = compare(result, ours)
    assert error < 1e-4 and same == 1
    assert result["tokens"] == greedy(ours)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_as_stored_in_bf16(name: str, dense_routing: Path, tmp_path: Path) -> None:
    """vLLM's own loader and kernels, 8-bit activations included. Measured: bf16 itself 5e-5, INT8 linears 3e-4."""
    form, options = QUANTIZED[name]
    export(dense_routing, tmp_path / "packed", form, progress=False, **options)
    result = score(tmp_path / "packed", tmp_path, dtype="bfloat16", routing=form != "fp8")
    found, ours = torch.tensor(result["logprobs"]), dequantized(tmp_path / "packed")
    kl = divergence(logprobs(ours), found)
    assert kl < 1e-3
    if form == "int4":  # the weights that it computes with are those of the export, not merely close to the model's
        assert kl < 0.1 * divergence(logprobs(dequantized(dense_routing)), found)


def test_mtp_drafts(tmp_path: Path) -> None:
    """A model that has learned to count: speculation changes no token, and most drafts are right."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(preset("tiny", **SIZES, rope_parameters=YARN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        ids = counting(torch.randint(0, 61, (8, 1)), torch.randint(1, 3, (8, 1)), 16 + NEW)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "bf16", "bf16", progress=False)
    ours = dequantized(tmp_path / "bf16")
    ids = counting(torch.tensor([[0], [7], [20]]), torch.tensor([[1], [2], [1]]), 16)
    stats = mtp_acceptance(ours, list(ids), NEW)
    assert stats["value"] > 0.5 and stats["drafts"] > 30
    result = score(tmp_path / "bf16", tmp_path, ids, mtp=True)
    assert result["tokens"] == greedy(ours, ids)
    assert result["accepted"] / result["drafts"] == pytest.approx(stats["value"], abs=0.1)
