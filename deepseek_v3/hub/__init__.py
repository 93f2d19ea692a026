"""Publishing: model cards."""

from .card import write_pretraining_card

__all__ = ["write_pretraining_card"]
