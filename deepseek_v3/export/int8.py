"""`int8`: W8A8, compressed-tensors' `int-quantized`. Weights with a scale per output, activations with one per token.

`X.weight` is int8 `[out, in]`, `X.weight_scale` bf16 `[out, 1]`; activations are quantized while the model runs. What
is not quantized is bf16.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels.int8 import quantize_int8
from . import compressed
from .options import FormatOptions
from .source import Source
from .steps import Output, Read, Step, copy_step


@dataclass(frozen=True)
class Options(FormatOptions):
    """`targets`: `linears` (see `compressed.chosen_weights`), or `experts`: the routed ones, the rest in 16 bits."""

    targets: Literal["experts", "linears"] = "linears"


def steps(source: Source, options: Options) -> list[Step]:
    chosen = set(compressed.chosen_weights(source, options.targets))
    return [_step(name, source) if name in chosen else copy_step(name, source) for name in source.names]


def _step(name: str, source: Source) -> Step:
    rows, columns = source.shape(name)
    outputs = (Output(name, "I8", (rows, columns)), Output(f"{name}_scale", "BF16", (rows, 1)))

    def run(read: Read) -> Iterable[torch.Tensor]:
        return quantize_int8(read(name).to(torch.bfloat16))

    return Step((name,), outputs, run, quantized=True)


def quantization_config(source: Source, options: Options) -> dict | None:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    chosen = compressed.chosen_weights(source, options.targets)
    return compressed.quantization_config(source, chosen, "int-quantized", weights, inputs)
