"""A classification head on a frozen base: what the base makes of a row never changes, so it is computed once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .batches import unlabelled_batches


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
    """The rows of `encode_classification`, each with `features [H]`: the state that the classifier's head is given."""
    classifier.eval()
    rows = [dict(example) for example in examples]
    for chosen, batch in unlabelled_batches(examples, pad_id, classifier.device):
        states = classifier.model(**batch, use_cache=False).last_hidden_state
        real = batch["input_ids"] != pad_id
        last = (torch.arange(real.shape[1], device=real.device) * real).argmax(-1)  # as transformers finds it
        for i, features in zip(chosen, states[torch.arange(len(last), device=last.device), last].cpu(), strict=True):
            rows[i]["features"] = features
    return rows


def stack_features(batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Collator: `features [B, H]`, `labels [B]` int64."""
    return {
        "features": torch.stack([row["features"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }
