"""A classification head on a frozen base: what the base makes of a row never changes, so it is computed once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .batches import pad_classification

BATCH = 16


class HeadOnFeatures(nn.Module):
    """The head alone, on the rows of `with_features`; it is the classifier's own module, which thereby trains."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.score, self.config = classifier.score, classifier.config

    def forward(self, features: torch.Tensor) -> SequenceClassifierOutput:
        """`[B, H]` -> logits `[B, C]`."""
        return SequenceClassifierOutput(logits=self.score(features))


@torch.no_grad()
def with_features(
    classifier: nn.Module, examples: Sequence[Mapping[str, Any]], pad_id: int
) -> list[dict[str, Any]]:
    """The rows of `encode_classification`, each with `features [H]`: the state of its last token."""
    classifier.eval()
    device = classifier.device
    rows = [dict(example) for example in examples]
    order = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = pad_classification(chosen, pad_id)
        batch.pop("labels")
        states = classifier.model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).last_hidden_state
        for row, states_ in zip(chosen, states.cpu(), strict=True):
            row["features"] = states_[len(row["input_ids"]) - 1].clone()
    return rows


def stack_features(batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Collator: `features [B, H]`, `labels [B]` int64."""
    return {
        "features": torch.stack([row["features"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }
