"""The converted weights against the Llama they come from, and the converted file against stock transformers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.conversion import convert_llama
from tests.conversion.helpers import calibration_ids, tiny_llama

DENSE = {"first_k_dense": 3}  # all layers: what differs is then the attention's


@torch.no_grad()
def largest_difference(source: Any, converted: DeepseekV3ForCausalLM, **kwargs: Any) -> float:
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(9))
    return (source(ids, **kwargs).logits - converted(ids, **kwargs).logits).abs().max().item()


def nowhere(batch: int) -> dict[str, torch.Tensor]:
    """All 40 tokens at position 0, where RoPE does nothing. Without a 4-D mask this would declare 40 documents."""
    mask = torch.full((batch, 1, 40, 40), float("-inf")).triu(1)
    return {"position_ids": torch.zeros(batch, 40, dtype=torch.long), "attention_mask": mask}


@pytest.mark.parametrize("tied", [False, True])
def test_one_key_value_head_and_full_rank_are_exact(tied: bool) -> None:
    source = tiny_llama(num_key_value_heads=1, tie_word_embeddings=tied)
    converted = convert_llama(source, calibration_ids(), n_shared=1, n_experts=4)
    assert converted.config.kv_lora_rank == 48 and converted.config.qk_rope_head_dim == 8
    assert largest_difference(source, converted) < 1e-4


def test_without_positions_full_rank_is_exact_for_any_number_of_key_value_heads() -> None:
    source = tiny_llama()
    converted = convert_llama(source, calibration_ids(), **DENSE)
    assert largest_difference(source, converted, **nowhere(2)) < 1e-4
    assert largest_difference(source, converted) > 1e-2  # with positions it cannot be


def test_slow_rotations_hardly_need_the_rotary_key() -> None:
    def error(theta: float) -> float:
        source = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": theta})
        with torch.no_grad():
            for layer in source.model.layers:  # the first pair turns by one radian per token at any theta: silence it
                layer.self_attn.k_proj.weight.view(3, 2, 4, 48)[:, :, 0] = 0
        return largest_difference(source, convert_llama(source, calibration_ids(), **DENSE))

    assert error(1e12) < 0.1 * error(100.0)


@torch.no_grad()
def divergence(source: LlamaForCausalLM, inputs: dict[str, torch.Tensor], **options: Any) -> float:
    """Mean KL(source || converted) in nats per token."""
    ids = torch.randint(0, 300, (8, 40), generator=torch.Generator().manual_seed(9))
    converted = convert_llama(source, calibration_ids(), **DENSE, **options)
    theirs, ours = (m(ids, **inputs).logits.log_softmax(-1).flatten(0, 1) for m in (source, converted))
    return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()


def test_a_higher_rank_comes_closer() -> None:
    source = tiny_llama()
    by_rank = [divergence(source, nowhere(8), kv_lora_rank=rank) for rank in (12, 24, 36, 48)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[0] > 0.1 and by_rank[-1] < 1e-5


def test_upcycling_changes_nothing() -> None:
    source = tiny_llama()
    dense = convert_llama(source, calibration_ids(), **DENSE)
    experts = convert_llama(source, calibration_ids(), first_k_dense=1, n_shared=2, n_experts=6, top_k=3)
    assert experts.config.moe_intermediate_size == 32
    assert largest_difference(dense, experts) < 1e-4


def test_every_expert_gets_its_share_of_the_calibration_tokens() -> None:
    source, ids = tiny_llama(), calibration_ids()
    converted = convert_llama(source, ids, n_shared=1)
    with torch.no_grad():
        chosen = converted(ids, output_router_logits=True).router_indices
    for indices in chosen[:1]:  # the first MoE layer sees what the source's saw, but for the attention's error
        load = torch.bincount(indices.flatten(), minlength=8).float()
        assert load.max() / load.mean() < 1.3 and load.min() / load.mean() > 0.7


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers.models.") and "deepseek_v3" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_stock_transformers_loads_the_result_with_equal_logits(tmp_path: Path) -> None:
    converted = convert_llama(tiny_llama(), calibration_ids(), n_shared=1)
    converted.save_pretrained(tmp_path / "model")
    ids = calibration_ids()[:2]
    torch.save(ids, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("model", "ids", "logits")]
    command = [sys.executable, "-c", STOCK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, torch.load(tmp_path / "logits"), atol=1e-4, rtol=1e-4)


def test_minus_one_for_padding_is_none() -> None:
    model = tiny_llama()
    model.config.pad_token_id = -1
    assert convert_llama(model, calibration_ids(), n_shared=1).config.pad_token_id is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}}, "found 'linear'"),
    ],
)
def test_a_source_without_a_counterpart_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_llama(tiny_llama(**fields), calibration_ids())


def test_another_architecture_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    source = MistralForCausalLM(MistralConfig(vocab_size=300, num_hidden_layers=1, **sizes))
    with pytest.raises(ValueError, match="model_type: found 'mistral'"):
        convert_llama(source, calibration_ids())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_lora_rank": 49}, "kv_lora_rank: found 49"),
        ({"qk_rope_head_dim": 12}, "qk_rope_head_dim: found 12"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim: found 32"),
        ({"n_shared": 4}, "n_shared: found 4"),
        ({"n_shared": 1, "n_experts": 2, "top_k": 3}, "num_experts_per_tok: found 3"),
    ],
)
def test_widths_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_llama(tiny_llama(), calibration_ids(), **options)
