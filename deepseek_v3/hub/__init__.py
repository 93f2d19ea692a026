"""Publishing: model cards."""

from .card import write_pretraining_card
from .finetuning_card import write_finetuning_cards

__all__ = ["write_finetuning_cards", "write_pretraining_card"]
