"""What is measured of a trained model besides bits per byte: MTP acceptance, samples."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM


@torch.no_grad()
def mtp_acceptance(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_new_tokens: int = 48
) -> dict[str, float]:
    """Greedy decoding with one MTP draft per step after the first 64 tokens of each text.

    Returns `acceptance` (share of drafts that the main model confirms), `tokens_per_forward` and `drafts`.
    """
    model.eval()
    if tokenizer.pad_token_id is None:  # for this batch only: where the mask is 0 any token will do
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=64).to(model.device)
    batch.pop("token_type_ids", None)
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_mtp=True,
        num_mtp_draft=1,
        return_dict_in_generate=True,
    )
    stats = output.mtp_stats
    return {
        "acceptance": stats.accepted[0] / max(1, stats.drafted[0]),
        "tokens_per_forward": stats.tokens_per_forward,
        "drafts": stats.drafted[0],
    }


@torch.no_grad()
def write_samples(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 96
) -> str:
    """Greedy and sampled continuations of `prompts` as one text."""
    model.eval()
    parts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        for title, options in (
            ("greedy", {"do_sample": False}),
            ("sampled, T=0.8", {"do_sample": True, "temperature": 0.8}),
        ):
            torch.manual_seed(0)
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            parts.append(f"=== {title}\n{text}\n")
    return "\n".join(parts)
