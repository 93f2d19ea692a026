"""Weights in fewer bits, for fine-tuning on top of them (QLoRA): NF4 for linear layers and routed experts."""

import logging

# On CPUs with AVX512-BF16, importing bitsandbytes looks for a kernel on the Hub that nothing here uses, and warns of
# its absence. (With the package `kernels` installed it downloads that kernel, unless HF_HUB_OFFLINE=1.)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .layers import bytes_per_parameter, quantized_fraction  # noqa: E402
from .nf4 import NF4Config, dequantize_, nf4_config, quantize_nf4_  # noqa: E402
from .packed import NF4Weight  # noqa: E402

__all__ = [
    "NF4Config",
    "NF4Weight",
    "bytes_per_parameter",
    "dequantize_",
    "nf4_config",
    "quantize_nf4_",
    "quantized_fraction",
]
