"""DeepSeek-V3 in the Hugging Face ecosystem: pretrain it, fine-tune it, quantize it, publish it.

Importing this package makes transformers' Auto classes use its configuration, models and tokenizer for
`model_type="deepseek_v3"` (see `registration.py`). The import is cheap: torch and transformers are loaded when a
class, or a room such as `deepseek_v3.quantization`, is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration

__version__ = "0.1.0"

_ROOM_OF = {
    "DeepseekV3Config": "configuration",
    "DeepseekV3ForCausalLM": "modeling_deepseek_v3",
    "DeepseekV3ForSequenceClassification": "modeling_deepseek_v3",
    "DeepseekV3ForTokenClassification": "modeling_deepseek_v3",
    "DeepseekV3Model": "modeling_deepseek_v3",
    "DeepseekV3PreTrainedModel": "modeling_deepseek_v3",
    "DeepseekV3Tokenizer": "tokenization",
}

_ROOMS = (
    "configuration",
    "conversion",
    "data",
    "evaluation",
    "export",
    "finetuning",
    "hub",
    "kernels",
    "modeling_deepseek_v3",
    "quantization",
    "tokenization",
    "training",
)

__all__ = ["__version__", *_ROOM_OF]  # noqa: PLE0604

if TYPE_CHECKING:
    from .configuration import DeepseekV3Config
    from .modeling_deepseek_v3 import (
        DeepseekV3ForCausalLM,
        DeepseekV3ForSequenceClassification,
        DeepseekV3ForTokenClassification,
        DeepseekV3Model,
        DeepseekV3PreTrainedModel,
    )
    from .tokenization import DeepseekV3Tokenizer


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF, *_ROOMS})


registration.install()
