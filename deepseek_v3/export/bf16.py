"""`bf16`: the official layout with plain weights; also in fp16 or fp32."""

from dataclasses import dataclass
from typing import Literal

import torch

from .options import FormatOptions
from .source import Source
from .steps import Step, copy_step

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Options(FormatOptions):
    """`dtype`: of every tensor but the routing bias, which is fp32."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"


def steps(source: Source, options: Options) -> list[Step]:
    return [copy_step(name, source, DTYPES[options.dtype]) for name in source.names]


def quantization_config(source: Source, options: Options) -> dict | None:
    return None


def config_dtype(options: Options) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
