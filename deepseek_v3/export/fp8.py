"""`fp8`: DeepSeek's own format. E4M3 codes in blocks of 128 x 128 with one fp32 scale each, `weight_scale_inv`, that
multiplies. All linear layers of attention and MLPs are in it; the rest is bf16."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..kernels.fp8_quant.reference import TILE, quantize_weight
from ..modeling_deepseek_v3.checkpoint import FP8_SUFFIX
from .options import FormatOptions
from .source import Source
from .steps import LINEAR, Output, Read, Step, copy_step


@dataclass(frozen=True)
class Options(FormatOptions):
    """`power_of_two`: scales rounded up to powers of two (ue8m0), as DeepSeek-V3.1 has them."""

    power_of_two: bool = False


def steps(source: Source, options: Options) -> list[Step]:
    return [
        _step(name, source, options) if LINEAR.fullmatch(name) else copy_step(name, source) for name in source.names
    ]


def _step(name: str, source: Source, options: Options) -> Step:
    rows, columns = source.shape(name)
    grid = (-(-rows // TILE), -(-columns // TILE))
    outputs = (Output(name, "F8_E4M3", (rows, columns)), Output(name + FP8_SUFFIX, "F32", grid))

    def run(read: Read) -> Iterable[torch.Tensor]:
        return quantize_blocks(read(name), options.power_of_two)

    return Step((name,), outputs, run, quantized=True)


def quantize_blocks(weight: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`[out, in]` -> E4M3 codes `[out, in]`, fp32 scales `[ceil(out/128), ceil(in/128)]`. By rows of blocks."""
    parts = [quantize_weight(part, False, power_of_two) for part in weight.split(TILE)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])


def quantization_config(source: Source, options: Options) -> dict | None:
    content = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    return {**content, **({"scale_fmt": "ue8m0"} if options.power_of_two else {}), "weight_block_size": [TILE, TILE]}
