"""bitsandbytes' two formats as it saves linear layers: NF4, and the weights of LLM.int8().

Nothing here runs bitsandbytes' own layers: on CPUs with AVX512-BF16 their first evaluation repacks a 4-bit weight, and
a file that is written afterwards holds rounded scales.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes import functional

from .layouts import Layout, Matrix, Parts, Stored
from .packed import BLOCK, NESTED_BLOCK, decode, decode_scales

_STATE = ".weight.quant_state.bitsandbytes__nf4"


@cache
def nf4_code() -> torch.Tensor:
    """The 16 values of NF4, fp32."""
    return functional.get_4bit_type("nf4", device="cpu")


@cache
def scale_code() -> torch.Tensor:
    """The 256 values of a scale that is quantized itself, fp32."""
    return functional.create_dynamic_map()


@dataclass(frozen=True)
class NF4Blocks(Layout):
    """4-bit codes in blocks of 64. `double`: the scales are 8-bit codes in blocks of 256, plus an offset.

    `state_bytes`: of bitsandbytes' own record, JSON, which holds the offset; kept so that it is written as it was.
    """

    double: bool
    state_bytes: int

    def _sizes(self, matrix: Matrix) -> tuple[int, int, int]:
        elements = matrix[0] * matrix[1]
        scales = math.ceil(elements / BLOCK)
        return math.ceil(elements / 2), scales, math.ceil(scales / NESTED_BLOCK)

    def stored(self, matrix: Matrix) -> dict[str, Stored]:
        packed, scales, nested = self._sizes(matrix)
        stored = {
            ".weight": Stored(("U8",), (packed, 1)),
            ".weight.absmax": Stored(("U8" if self.double else "F32",), (scales,)),
            ".weight.quant_map": Stored(("F32",), (16,)),
            _STATE: Stored(("U8",), None),
        }
        if self.double:
            stored[".weight.nested_absmax"] = Stored(("F32",), (nested,))
            stored[".weight.nested_quant_map"] = Stored(("F32",), (256,))
        return stored

    def parts(self, matrix: Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        packed, scales, nested = self._sizes(matrix)
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.uint8, (packed,)),
            "absmax": (torch.uint8 if self.double else torch.float32, (scales,)),
            "state": (torch.uint8, (self.state_bytes,)),
        }
        if self.double:
            parts["nested_absmax"] = (torch.float32, (nested,))
            parts["offset"] = (torch.float32, ())
        return parts

    def read(self, part: str, matrix: Matrix, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if part == "packed":
            _check_code(tensor, ".weight.quant_map", nf4_code())
            return tensor(".weight").flatten()
        if part == "nested_absmax":
            _check_code(tensor, ".weight.nested_quant_map", scale_code())
        if part in ("absmax", "nested_absmax"):
            return tensor(f".weight.{part}")
        record = tensor(_STATE)
        state = self._checked(bytes(record.tolist()), matrix)
        if part == "state":
            return F.pad(record, (0, self.state_bytes - len(record)), value=ord(" "))
        return torch.tensor(state["nested_offset"])

    def _checked(self, record: bytes, matrix: Matrix) -> dict:
        """bitsandbytes' record."""
        try:
            state = json.loads(record)
        except (ValueError, RecursionError):
            state = None
        needed: dict[str, object] = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(matrix)}
        if self.double:
            needed |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        if not isinstance(state, dict) or {key: state.get(key) for key in needed} != needed:
            raise ValueError(f"{_STATE[1:]} is {record[:300]!r}, allowed is a JSON object with {needed}")
        offset = state.get("nested_offset")
        if self.double and not (type(offset) is float and math.isfinite(offset)):
            raise ValueError(f"{_STATE[1:]}: nested_offset is {offset!r:.100}, allowed is a number")
        return state

    def write(self, parts: Parts, matrix: Matrix) -> dict[str, torch.Tensor]:
        record = bytes(parts["state"].tolist()).rstrip()
        stored = {
            ".weight": parts["packed"].unsqueeze(1),
            ".weight.absmax": parts["absmax"],
            ".weight.quant_map": nf4_code().clone(),
            _STATE: torch.tensor(list(record), dtype=torch.uint8),
        }
        if self.double:
            stored[".weight.nested_absmax"] = parts["nested_absmax"]
            stored[".weight.nested_quant_map"] = scale_code().clone()
        return stored

    def dequantize(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        absmax = parts["absmax"]
        if self.double:
            code = scale_code().to(absmax.device)
            absmax = decode_scales(absmax, parts["nested_absmax"], code, parts["offset"])
        return decode(parts["packed"], absmax, torch.Size(matrix), dtype)

    def linear(self, x: torch.Tensor, parts: Parts, matrix: Matrix, cache: dict) -> torch.Tensor | None:
        """bitsandbytes' product, but not on CPUs, where it is wrong for widths that are no multiple of 64."""
        if x.device.type == "cpu":
            return None
        if "state" not in cache:
            cache["state"] = self._quant_state(parts, matrix, x.dtype)
        return bitsandbytes.matmul_4bit(x, parts["packed"].unsqueeze(1).t(), quant_state=cache["state"])

    def _quant_state(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> functional.QuantState:
        device = parts["packed"].device
        nested = {}
        if self.double:
            state2 = functional.QuantState(
                parts["nested_absmax"], code=scale_code().to(device), blocksize=NESTED_BLOCK, dtype=torch.float32
            )
            nested = {"offset": parts["offset"], "state2": state2}
        return functional.QuantState(
            parts["absmax"],
            shape=torch.Size(matrix),
            code=nf4_code().to(device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            **nested,
        )


def _check_code(tensor: Callable[[str], torch.Tensor], suffix: str, code: torch.Tensor) -> None:
    if not torch.equal(tensor(suffix), code):
        raise ValueError(f"{suffix[1:]} holds other values than bitsandbytes {bitsandbytes.__version__} writes")


@dataclass(frozen=True)
class LLMInt8Rows(Layout):
    """8-bit codes and the largest magnitude of each row, which 127 stands for. The layer's input is not quantized."""

    def stored(self, matrix: Matrix) -> dict[str, Stored]:
        return {
            ".weight": Stored(("I8",), matrix),
            ".SCB": Stored(("F32",), matrix[:1]),
            ".weight_format": Stored(("U8",), ()),
        }

    def parts(self, matrix: Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weight": (torch.int8, matrix), "SCB": (torch.float32, matrix[:1])}

    def read(self, part: str, matrix: Matrix, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if part == "weight" and (found := int(tensor(".weight_format"))) != 0:
            raise ValueError(f"weight_format is {found}, allowed is 0 (rows)")
        return super().read(part, matrix, tensor)

    def write(self, parts: Parts, matrix: Matrix) -> dict[str, torch.Tensor]:
        return super().write(parts, matrix) | {".weight_format": torch.tensor(0, dtype=torch.uint8)}

    def dequantize(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        weight = parts["weight"].float().mul_(parts["SCB"].unsqueeze(-1))
        return weight.mul_(7.874015718698502e-3).to(dtype)  # 1 / 127, as bitsandbytes rounds it


def nf4_tensors(weight: torch.Tensor, double_quant: bool = True) -> dict[str, torch.Tensor]:
    """What bitsandbytes saves of a 4-bit layer with this weight `[out, in]` (bf16, fp16 or fp32), by suffix."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    return {".weight": packed} | {f".weight.{key}": part for key, part in state.as_dict(packed=True).items()}


def llm_int8_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What bitsandbytes saves of an LLM.int8() layer with this weight `[out, in]`, by suffix; it is rounded to fp16
    first."""
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    return {".weight": codes, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
