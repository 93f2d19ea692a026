"""Text to ids and back: DeepSeek-V3's tokenizer, chat template, fill-in-the-middle, training a new vocabulary."""

from .chat_template import CHAT_TEMPLATE
from .files import check_vocab
from .fim import fim_transform
from .loading import load_tokenizer
from .moonshot import convert_tiktoken
from .tokenizer import DeepseekV3Tokenizer
from .train import train_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "DeepseekV3Tokenizer",
    "check_vocab",
    "convert_tiktoken",
    "fim_transform",
    "load_tokenizer",
    "train_tokenizer",
]
