"""`bnb-int8`: bitsandbytes' LLM.int8(), as its `Linear8bitLt` saves it, for linear layers and every single expert.

`X.weight` is int8 `[out, in]`; `X.SCB` fp32 `[out]`, the largest magnitude of each row, which code 127 stands for;
`X.weight_format` uint8, 0 for rows. What is not quantized is bf16.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from ..quantization.bitsandbytes_layouts import LLMInt8Rows, llm_int8_tensors
from . import bnb
from .options import FormatOptions
from .source import Source
from .steps import Step, cast


@dataclass(frozen=True)
class Options(FormatOptions):
    """`targets`: `linears`: all linear layers of attention and MLPs, those of MTP layers included; or `experts`: the
    routed ones only."""

    targets: Literal["experts", "linears"] = "linears"


def steps(source: Source, options: Options) -> list[Step]:
    def quantize(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        return llm_int8_tensors(cast(weight, torch.float16, name))  # bitsandbytes takes no other dtype

    return bnb.steps(source, options.targets, LLMInt8Rows(), quantize)


def quantization_config(source: Source, options: Options) -> dict | None:
    skipped = bnb.skipped_modules(source, options.targets)
    return bnb.config_dict(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped))
