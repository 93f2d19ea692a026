"""`int4`: W4A16, compressed-tensors' `pack-quantized`. Four bits a weight and a bf16 scale for each group of inputs.

`X.weight` becomes `X.weight_packed` int32 `[out, in / 8]` (lowest four bits first, code + 8), `X.weight_scale` bf16
`[out, in / group]` and `X.weight_shape` int64 `[2]`. What is not quantized is bf16.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..kernels.int4 import GROUP_SIZES, pack_int4, quantize_int4
from . import compressed
from .calibration import Calibration, Quantize, calibration_rows
from .gptq import Gptq, round_to_grid, search_scales, spread
from .learned_scales import LearnedScales
from .options import FormatOptions
from .source import Source
from .steps import Output, Read, Step, copy_step

CALIBRATED: dict[str, Callable[[torch.Tensor, int], Quantize]] = {"gptq": Gptq, "learned": LearnedScales}


@dataclass(frozen=True)
class Options(FormatOptions):
    """How to quantize.

    Attributes:
        method: `rtn` rounds to nearest; `mse` with scales of least squared error; `gptq` rounds so that the layer's
            output on calibration text is kept; `learned` improves on that by gradient descent.
        group_size: inputs that share a scale.
        targets: `experts` (the routed ones) or `linears` (see `compressed.chosen_weights`).
        calibration: a corpus as `load_corpus` takes it, whose training split is used by `gptq` and `learned`.
        calibration_rows, calibration_length: rows of that text, and tokens in each.
        seed: of the choice of rows.
    """

    method: Literal["gptq", "learned", "mse", "rtn"] = "gptq"
    group_size: int = 128
    targets: Literal["experts", "linears"] = "experts"
    calibration: str = "stdlib"
    calibration_rows: int = 128
    calibration_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: found {self.group_size!r}, allowed are {', '.join(map(str, GROUP_SIZES))}")
        for name, least in (("calibration_rows", 1), ("calibration_length", 2), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: found {value!r}, allowed are whole numbers from {least}")


def steps(source: Source, options: Options) -> list[Step]:
    chosen = compressed.chosen_weights(source, options.targets)
    _check_groups({name: source.shape(name)[1] for name in chosen}, options)
    calibration: Calibration | None = None
    if options.method in CALIBRATED:
        rows, _ = _rows(source, options)
        fit = CALIBRATED[options.method]
        calibration = Calibration(source, rows, chosen, lambda moment: fit(moment, options.group_size))
    quantized = set(chosen)
    return [
        _step(name, source, options, calibration) if name in quantized else copy_step(name, source)
        for name in source.names
    ]


def _step(name: str, source: Source, options: Options, calibration: Calibration | None) -> Step:
    rows, columns = source.shape(name)
    outputs = (
        Output(f"{name}_packed", "I32", (rows, columns // 8)),
        Output(f"{name}_scale", "BF16", (rows, columns // options.group_size)),
        Output(f"{name}_shape", "I64", (2,)),
    )

    def run(read: Read) -> Iterable[torch.Tensor]:
        if calibration is not None:
            codes, scale = calibration.take(name)
            packed = pack_int4(codes)
        else:
            packed, scale = PLAIN[options.method](read(name).to(torch.bfloat16), options.group_size)
        return packed, scale, torch.tensor((rows, columns))

    return Step((name,), outputs, run, quantized=True)


def quantize_mse(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_int4`, with the scales of `search_scales`."""
    scale = search_scales(weight, group_size)
    return pack_int4(round_to_grid(weight.float(), spread(scale, weight.shape[1]))), scale


PLAIN = {"rtn": quantize_int4, "mse": quantize_mse}


def _check_groups(inputs: Mapping[str, int], options: Options) -> None:
    """`inputs`: of every weight that is quantized."""
    if name := next((name for name, count in inputs.items() if count % options.group_size), None):
        fitting = [str(size) for size in GROUP_SIZES if not any(count % size for count in inputs.values())]
        allowed = f"allowed are {', '.join(fitting)}" if fitting else f"no size fits all {options.targets}"
        raise ValueError(f"group_size: found {options.group_size}, but {name} has {inputs[name]} inputs; {allowed}")


def _rows(source: Source, options: Options) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    rows, length = options.calibration_rows, options.calibration_length
    return calibration_rows(source.tokenizer_folder, options.calibration, rows, length, options.seed)


def calibration(source: Source, options: Options) -> dict[str, Any] | None:
    """The record of the text, which is read anew: it may have changed since an export before this one."""
    if options.method not in CALIBRATED:
        return None
    calibration_rows.cache_clear()
    return _rows(source, options)[1]


def quantization_config(source: Source, options: Options) -> dict | None:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": options.group_size,
        "dynamic": False,
        "actorder": None,
    }
    chosen = compressed.chosen_weights(source, options.targets)
    return compressed.quantization_config(source, chosen, "pack-quantized", weights, None)
