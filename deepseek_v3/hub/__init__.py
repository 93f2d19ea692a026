"""Publishing: model cards from a run's record, and pushing folders to the Hub."""

from .conversion_card import write_conversion_card
from .export_card import write_export_card
from .finetuning_card import figure_text, write_finetuning_cards
from .pretraining_card import write_pretraining_card
from .push import PushResult, push, push_model, push_tokenizer

__all__ = [
    "PushResult",
    "figure_text",
    "push",
    "push_model",
    "push_tokenizer",
    "write_conversion_card",
    "write_export_card",
    "write_finetuning_cards",
    "write_pretraining_card",
]
