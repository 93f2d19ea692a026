"""What is measured of a trained model besides bits per byte: MTP acceptance, samples."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM


@torch.no_grad()
def mtp_acceptance(
    model: DeepseekV3ForCausalLM, prompts: torch.Tensor, max_new_tokens: int = 48
) -> dict[str, float] | None:
    """Greedy decoding with one MTP draft per step after each of `prompts`, int64 `[B, S]`.

    Returns `acceptance` (share of drafts that the main model confirms), `tokens_per_forward` and `drafts`; None if
    every text ended before a draft.
    """
    model.eval()
    ids = prompts.to(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_mtp=True,
        num_mtp_draft=1,
        return_dict_in_generate=True,
    )
    stats = output.mtp_stats
    if not stats.drafted[0]:
        return None
    return {
        "acceptance": stats.accepted[0] / stats.drafted[0],
        "tokens_per_forward": stats.tokens_per_forward,
        "drafts": stats.drafted[0],
    }


@torch.no_grad()
def write_samples(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 96
) -> str:
    """Greedy and sampled continuations of `prompts`, each after a BOS as in training, as one text."""
    model.eval()
    parts = []
    for prompt in prompts:
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt_ids = torch.tensor([[tokenizer.bos_token_id, *tokens]], device=model.device)
        for title, options in (
            ("greedy", {"do_sample": False}),
            ("sampled, T=0.8", {"do_sample": True, "temperature": 0.8}),
        ):
            torch.manual_seed(0)
            ids = model.generate(
                prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=max_new_tokens, **options
            )
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            parts.append(f"=== {title}\n{text}\n")
    return "\n".join(parts)
