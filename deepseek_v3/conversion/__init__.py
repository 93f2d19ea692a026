"""Pretrained Llama-type models become DeepSeek-V3 models: attention factorised, MLPs upcycled, then healed."""

from .healing import heal, heldout_bits_per_byte
from .llama import convert_llama
from .run import convert
from .source import load_source

__all__ = ["convert", "convert_llama", "heal", "heldout_bits_per_byte", "load_source"]
