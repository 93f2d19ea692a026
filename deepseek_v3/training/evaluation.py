"""What is measured of a trained model: held-out bits per byte, MTP acceptance, samples."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..data import IGNORE_INDEX, PackedDataset, bits_per_byte
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from .loop import model_inputs


@torch.no_grad()
def heldout_bits_per_byte(
    model: DeepseekV3ForCausalLM,
    dataset: PackedDataset,
    n_bytes: int,
    document_mask: bool,
    batch_size: int = 16,
    max_rows: int | None = None,
) -> float:
    """Bits per byte of the held-out text; `dataset` is packed with `evaluation=True`.

    `max_rows` evaluates the first rows only and scales `n_bytes` by their share of the predicted tokens.
    """
    training = model.training
    model.eval()
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    nats, predicted = 0.0, 0
    for start in range(0, rows, batch_size):
        batch = dataset.rows(range(start, min(start + batch_size, rows)))
        count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        batch = model_inputs(batch, document_mask, model.device)
        nats += float(model(**batch, skip_logits=True).ce_loss) * count
        predicted += count
    model.train(training)
    total = len(dataset.stream) - len(dataset.document_starts)
    return bits_per_byte(nats, round(n_bytes * predicted / total))


@torch.no_grad()
def mtp_acceptance(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_new_tokens: int = 48
) -> dict[str, float]:
    """Greedy decoding with one MTP draft per step after the first 64 tokens of each text.

    Returns `acceptance` (share of drafts that the main model confirms), `tokens_per_forward` and `drafts`.
    """
    model.eval()
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
