"""Speed and MTP acceptance of a causal language model as it is loaded."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from .estimates import ratio_of_sums

DECODED = 64  # tokens, for the speed
REPEATS = 3
MTP_TOKENS = 48  # of each prompt's continuation


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of process CPU seconds on the CPU, of wall-clock seconds elsewhere; after one run to warm up."""
    run()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(REPEATS):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return statistics.median(times)


@contextmanager
def _without_settings(model: DeepseekV3ForCausalLM) -> Iterator[None]:
    """`generate` takes none of the model's own settings (beams, caches, penalties) but the end of a text."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def throughput(model: DeepseekV3ForCausalLM, prompt: torch.Tensor) -> dict[str, Any]:
    """Tokens per second with batch 1: the forward pass over `prompt` (int64 `[S]`), then `DECODED` greedy tokens.
    The model's generation settings do not count.

    `clock` tells what a second is: process CPU time on a CPU, so that other processes do not count; else wall-clock.
    """
    model.eval()
    ids = prompt[None].to(model.device)

    def prefill() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        options = {"do_sample": False, "min_new_tokens": DECODED + 1, "max_new_tokens": DECODED + 1}
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    before = _seconds(prefill, model.device)
    with _without_settings(model):
        both = _seconds(decode, model.device)
    return {
        "prefill_tokens_per_second": ids.shape[1] / before,
        "decode_tokens_per_second": DECODED / max(both - before, 1e-9),
        "prompt_tokens": ids.shape[1],
        "decoded_tokens": DECODED,
        "clock": "process CPU time" if model.device.type == "cpu" else "wall-clock",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def mtp_acceptance(
    model: DeepseekV3ForCausalLM, prompts: Sequence[torch.Tensor], max_new_tokens: int | None = None
) -> dict[str, Any] | None:
    """Share of greedy MTP drafts, one per step, that the main model confirms; None for a model without MTP layers.
    Of the model's generation settings only `eos_token_id` counts.

    Args:
        prompts: int64 `[S]` each. `n` of the interval counts them; `drafts` are the drafts behind the figure.
        max_new_tokens: of each continuation; None takes `MTP_TOKENS`.
    """
    if not model.config.num_nextn_predict_layers:
        return None
    model.eval()
    accepted, drafted = [], []
    with _without_settings(model):
        for prompt in prompts:
            ids = prompt[None].to(model.device)
            stats = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                pad_token_id=0,
                max_new_tokens=max_new_tokens or MTP_TOKENS,
                do_sample=False,
                use_mtp=True,
                num_mtp_draft=1,
                return_dict_in_generate=True,
            ).mtp_stats
            accepted.append(stats.accepted[0])
            drafted.append(stats.drafted[0])
    return {**ratio_of_sums(np.array(accepted), np.array(drafted)), "drafts": sum(drafted)}
