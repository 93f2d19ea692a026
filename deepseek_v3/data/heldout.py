"""Held-out bits per byte of a model, the same figure after pretraining, conversion and fine-tuning."""

import torch
from torch import nn

from .metrics import bits_per_byte
from .packing import IGNORE_INDEX, PackedDataset


@torch.no_grad()
def heldout_bits_per_byte(
    model: nn.Module,
    dataset: PackedDataset,
    n_bytes: int,
    document_mask: bool,
    batch_size: int = 16,
    max_rows: int | None = None,
) -> float:
    """Bits per byte of a causal language model on held-out text; `dataset` is packed with `evaluation=True`.

    With `document_mask` packed documents do not see each other. `batch_size`: rows per forward pass. `max_rows`
    evaluates the first rows only and scales `n_bytes` by their share of the predicted tokens.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    nats, predicted = 0.0, 0
    for start in range(0, rows, batch_size):
        batch = dataset.rows(range(start, min(start + batch_size, rows)))
        count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        batch = {k: v.to(device) for k, v in batch.items() if document_mask or k != "position_ids"}
        nats += float(model(**batch, use_cache=False, skip_logits=True).ce_loss) * count
        predicted += count
    model.train(training)
    total = len(dataset.stream) - len(dataset.document_starts)
    return bits_per_byte(nats, round(n_bytes * predicted / total))
