"""`nf4`: bitsandbytes' 4-bit NormalFloat, as its `Linear4bit` saves it, for linear layers and every single expert.

`X.weight` is uint8 `[ceil(out in / 2), 1]`, `X.weight.absmax` a scale per 64 elements in row order, and
`X.weight.quant_state.bitsandbytes__nf4` a JSON record. With double quantization the scales are 8-bit codes, which
`nested_absmax`, `nested_quant_map` and the record's `nested_offset` decode. What is not quantized is bf16.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from ..quantization.bitsandbytes_layouts import NF4Blocks, nf4_tensors
from . import bnb
from .options import FormatOptions
from .source import Source
from .steps import Step, cast

RECORD = ".weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Options(FormatOptions):
    """
    Attributes:
        double_quant: whether the scales are quantized too: 0.516 bytes per weight instead of 0.5625.
        targets: `linears`: all linear layers of attention and MLPs, those of MTP layers included; or `experts`: the
            routed ones only.
    """

    double_quant: bool = True
    targets: Literal["experts", "linears"] = "linears"


def steps(source: Source, options: Options) -> list[Step]:
    def quantize(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        # bf16 is the dtype that bitsandbytes notes, and dequantizes to
        tensors = nf4_tensors(cast(weight, torch.bfloat16, name), options.double_quant)
        return tensors | {RECORD: _padded(tensors[RECORD])}

    return bnb.steps(source, options.targets, NF4Blocks(options.double_quant, bnb.RECORD_BYTES), quantize)


def _padded(record: torch.Tensor) -> torch.Tensor:
    """JSON, with spaces before its last brace, since the number of an offset's digits is not known in advance."""
    text = bytes(record.tolist()).removesuffix(b"}").ljust(bnb.RECORD_BYTES - 1) + b"}"
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def quantization_config(source: Source, options: Options) -> dict | None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=bnb.skipped_modules(source, options.targets),
    )
    return bnb.config_dict(config)
