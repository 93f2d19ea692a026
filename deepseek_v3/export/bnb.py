"""What the formats of bitsandbytes share: which weights are quantized, their steps, and how config.json says so."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..quantization.layouts import Layout
from . import compressed
from .source import Source
from .steps import LINEAR, Output, Read, Step, copy_step

RECORD_BYTES = 192  # of a weight in NF4; bitsandbytes' own have at most 182: an offset has up to 22 characters
Quantize = Callable[[torch.Tensor, str], dict[str, torch.Tensor]]  # a weight and its name -> what is stored, by suffix


def chosen_weights(source: Source, targets: str) -> list[str]:
    """Official names of the weights to quantize, in order. MTP layers are treated as the others: stock transformers
    passes over them, and this package reads them either way."""
    pattern = compressed.ROUTED if targets == "experts" else LINEAR
    return [name for name in source.names if LINEAR.fullmatch(name) and pattern.fullmatch(name)]


def skipped_modules(source: Source, targets: str) -> list[str]:
    """The head, and by name all other linear layers that stay in bf16. The routers are no linear layers there."""
    chosen = set(chosen_weights(source, targets))
    linears = [name for name in source.names if LINEAR.fullmatch(name) or name.endswith(".eh_proj.weight")]
    return [compressed.head_module(source), *(name.removesuffix(".weight") for name in linears if name not in chosen)]


def steps(source: Source, targets: str, layout: Layout, quantize: Quantize) -> list[Step]:
    """The chosen weights as `layout` stores them; the others are copied."""
    chosen = set(chosen_weights(source, targets))
    return [
        _step(name, source, layout, quantize) if name in chosen else copy_step(name, source) for name in source.names
    ]


def _step(name: str, source: Source, layout: Layout, quantize: Quantize) -> Step:
    module, (rows, columns) = name.removesuffix(".weight"), source.shape(name)
    stored = layout.stored((rows, columns))
    outputs = tuple(
        Output(module + suffix, header.dtypes[0], (RECORD_BYTES,) if header.shape is None else header.shape)
        for suffix, header in stored.items()
    )

    def run(read: Read) -> Iterable[torch.Tensor]:
        tensors = quantize(read(name), name)
        return [tensors[suffix] for suffix in stored]

    return Step((name,), outputs, run, quantized=True)


def config_dict(config: BitsAndBytesConfig) -> dict[str, Any]:
    """As transformers writes it to config.json."""
    return {**config.to_dict(), "quant_method": "bitsandbytes"}
