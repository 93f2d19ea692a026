"""Publishing: model cards."""

from .card import write_pretraining_card
from .finetuning_card import figure_text, write_finetuning_cards

__all__ = ["figure_text", "write_finetuning_cards", "write_pretraining_card"]
