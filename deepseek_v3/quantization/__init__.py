"""Weights in fewer bits: checkpoints that are stored so (FP8 blocks, INT4, INT8, bitsandbytes' formats), and NF4 made
while loading or in memory, for fine-tuning on top of it (QLoRA)."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .models import bytes_per_parameter, dequantize_, quantized_fraction

if TYPE_CHECKING:
    from .loading import PackedConfig, packed_config
    from .nf4 import NF4Config, nf4_config, quantize_nf4_
    from .packed import NF4Weight
    from .packed_weight import PackedWeight

# On CPUs with AVX512-BF16, importing bitsandbytes looks for a kernel on the Hub that nothing here uses, and warns of
# its absence. (With the package `kernels` installed it downloads that kernel, unless HF_HUB_OFFLINE=1.)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# name -> its module, imported when it is asked for: those of NF4 need bitsandbytes
_LAZY = {
    "NF4Config": "nf4",
    "NF4Weight": "packed",
    "PackedConfig": "loading",
    "PackedWeight": "packed_weight",
    "nf4_config": "nf4",
    "packed_config": "loading",
    "quantize_nf4_": "nf4",
}

__all__ = [
    "NF4Config",
    "NF4Weight",
    "PackedConfig",
    "PackedWeight",
    "bytes_per_parameter",
    "dequantize_",
    "nf4_config",
    "packed_config",
    "quantize_nf4_",
    "quantized_fraction",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
