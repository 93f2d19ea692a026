"""Continuous batching on latents writes what `generate` writes, for requests of any lengths that share a batch."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from deepseek_v3.modeling_deepseek_v3 import continuous_batching
from tests.modeling_deepseek_v3.helpers import build, tiny_config, tokens

LENGTHS = (3, 17, 1, 9, 30, 2)


def batching(**kwargs) -> ContinuousBatchingConfig:
    # pages of 16 tokens: requests span several, and `max_batch_tokens` splits the longest prompt
    return ContinuousBatchingConfig(**{"num_blocks": 24, "page_size": 16, "max_batch_tokens": 24, **kwargs})


def requests(model, new: int, lengths=LENGTHS) -> tuple[list[list[int]], list[list[int]], GenerationConfig]:
    """Prompts, the continuations that plain `generate` gives them one by one, and the configuration for a batch."""
    prompts = [tokens(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    expected = [
        model.generate(torch.tensor([p]), eos_token_id=None, **arguments)[0, len(p) :].tolist() for p in prompts
    ]
    return prompts, expected, GenerationConfig(eos_token_id=-1, **arguments)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kv_lora_rank": 27, "v_head_dim": 12, "q_lora_rank": None}])
def test_text_is_that_of_generate(implementation, absorb, sizes, monkeypatch):
    model = build(tiny_config(**sizes), attn_implementation=implementation)
    prompts, expected, config = requests(model, 20)
    attention = type(model.model.layers[0].self_attn)
    absorbed, absorbs = [], attention._absorbs

    def decide(self, *arguments):
        absorbed.append(absorb and absorbs(self, *arguments))
        return absorbed[-1]

    monkeypatch.setattr(attention, "_absorbs", decide)
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching())
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert any(absorbed) == (absorb and implementation != "eager")


def test_the_model_is_left_as_it_was_and_works_again():
    model = build(attn_implementation="eager")
    before = model.config.to_dict()
    prompts, expected, config = requests(model, 4)
    for _ in range(2):
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching())
        assert [output.generated_tokens for output in outputs.values()] == expected
        assert model.config.to_dict() == before and type(model.config).__name__ == "DeepseekV3Config"
        assert model.config._attn_implementation == "eager"


def test_requests_share_the_pages_of_a_common_prefix():
    model = build(attn_implementation="sdpa")
    prefix = tokens(1, 40)[0].tolist()
    prompts = [prefix + [i, i + 1] for i in (5, 9, 13)]
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([p]), eos_token_id=None, **arguments)[0, 42:].tolist() for p in prompts]
    config = GenerationConfig(eos_token_id=-1, **arguments)
    settings = batching(allow_block_sharing=True, max_batch_tokens=64, max_requests_per_batch=1)
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=settings)
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_a_token_takes_the_memory_of_its_latent(monkeypatch):
    caches = []
    update = continuous_batching.PagedAttentionCache.update
    monkeypatch.setattr(
        continuous_batching.PagedAttentionCache,
        "update",
        lambda self, *args, **kwargs: (caches.append(self), update(self, *args, **kwargs))[1],
    )
    model = build(attn_implementation="sdpa")
    prompts, _, config = requests(model, 2)
    model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching())
    page = caches[0].cache_allocators["full_attention"].bytes_per_page
    assert page == 16 * (model.config.kv_lora_rank + model.config.qk_rope_head_dim) * 4  # fp32
    assert caches[0].cache_tensor.numel() >= 24 * page * model.config.num_hidden_layers


def test_a_manager_can_be_restarted():
    model = build(attn_implementation="sdpa")
    prompts, expected, config = requests(model, 5, (3, 8))
    arguments = {"generation_config": config, "continuous_batching_config": batching()}
    for _ in range(2):
        outputs = model.generate_batch(prompts, **arguments, persistent_manager=True)
        assert [output.generated_tokens for output in outputs.values()] == expected
    model.destroy_cached_continuous_batching_manager()


def test_mtp_is_refused():
    model = build(attn_implementation="sdpa")
    config = GenerationConfig(max_new_tokens=2, use_mtp=True, eos_token_id=-1)
    with pytest.raises(ValueError, match="use_mtp: found True, allowed False"):
        model.generate_batch([[5, 6]], generation_config=config, continuous_batching_config=batching())
