"""`nf4`: bitsandbytes' 4-bit NormalFloat, as its `Linear4bit` saves it, for linear layers and every single expert.

`X.weight` is uint8 `[ceil(out in / 2), 1]`, `X.weight.absmax` a scale per 64 elements in row order, and
`X.weight.quant_state.bitsandbytes__nf4` a JSON record. With double quantization the scales are 8-bit codes, which
`nested_absmax`, `nested_quant_map` and the record's `nested_offset` decode. What is not quantized is bf16.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import BitsAndBytesConfig

from . import compressed
from .source import CLASSIFIERS, Source
from .steps import LINEAR, Output, Read, Step, cast, copy_step

if TYPE_CHECKING:
    from ..quantization.layouts import Layout

RECORD = ".weight.quant_state.bitsandbytes__nf4"
RECORD_BYTES = 192  # bitsandbytes' own have at most 182: an offset is printed in up to 22 characters


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        double_quant: whether the scales are quantized too: 0.516 bytes per weight instead of 0.5625.
        targets: `linears`: all linear layers of attention and MLPs, those of MTP layers included; or `experts`: the
            routed ones only.
    """

    double_quant: bool = True
    targets: Literal["linears", "experts"] = "linears"

    def __post_init__(self) -> None:
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant: found {self.double_quant!r}, allowed are True and False")
        compressed.check_targets(self.targets)


def steps(source: Source, options: Options) -> list[Step]:
    layouts = bitsandbytes_layouts("nf4")
    layout = layouts.NF4Blocks(options.double_quant, RECORD_BYTES)

    def quantize(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        # bf16 is the dtype that bitsandbytes notes, and dequantizes to
        tensors = layouts.nf4_tensors(cast(weight, torch.bfloat16, name), options.double_quant)
        return tensors | {RECORD: _padded(tensors[RECORD])}

    chosen = set(chosen_weights(source, options.targets))
    return [
        quantized_step(name, source, layout, quantize) if name in chosen else copy_step(name, source)
        for name in source.names
    ]


def _padded(record: torch.Tensor) -> torch.Tensor:
    """JSON, with spaces before its last brace, since the number of an offset's digits is not known in advance."""
    text = bytes(record.tolist()).removesuffix(b"}").ljust(RECORD_BYTES - 1) + b"}"
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def quantization_config(source: Source, options: Options) -> dict | None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped_modules(source, chosen_weights(source, options.targets)),
    )
    return config_dict(config)


# --- what the two formats of bitsandbytes share --------------------------------------------------------------------


def bitsandbytes_layouts(format: str) -> ModuleType:
    """`quantization.bitsandbytes_layouts`; `ValueError` without bitsandbytes, which it needs."""
    try:
        from ..quantization import bitsandbytes_layouts
    except ModuleNotFoundError as error:
        raise ValueError(f"format: {format} needs bitsandbytes: pip install bitsandbytes ({error})") from error
    return bitsandbytes_layouts


def chosen_weights(source: Source, targets: str) -> list[str]:
    """Official names of the weights to quantize, in order. MTP layers are treated as the others: stock transformers
    passes over them, and this package reads them either way."""
    pattern = compressed.ROUTED if targets == "experts" else LINEAR
    return [name for name in source.names if LINEAR.fullmatch(name) and pattern.fullmatch(name)]


def skipped_modules(source: Source, chosen: Collection[str]) -> list[str]:
    """The head, and by name all other linear layers that stay in bf16. The routers are no linear layers there."""
    chosen = set(chosen)
    head = "score" if source.config.architectures[0] in CLASSIFIERS.values() else "lm_head"
    linears = [name for name in source.names if LINEAR.fullmatch(name) or name.endswith(".eh_proj.weight")]
    return [head, *(name.removesuffix(".weight") for name in linears if name not in chosen)]


def quantized_step(
    name: str,
    source: Source,
    layout: "Layout",
    quantize: Callable[[torch.Tensor, str], dict[str, torch.Tensor]],
) -> Step:
    """`quantize(weight, name)` returns what `layout` stores of it, by suffix."""
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
