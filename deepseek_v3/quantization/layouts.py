"""How a weight `[out, in]` lies in a file and in memory, for each quantized format that is read.

A layout knows one matrix; `PackedWeight` holds the parts of one, or those of a layer's experts stacked.

Shape legend: n matrices, all `[out, in]` (the `matrix`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..kernels.fp8_gemm import fp8_gemm
from ..kernels.fp8_quant import dequantize_weight_fp8, quantize_activation_fp8
from ..kernels.fp8_quant.reference import TILE
from ..kernels.int4 import CpuPacked, dequantize_int4, int4_grouped_linear, int4_linear, pack_int4_for_cpu
from ..kernels.int4.reference import CPU_KERNEL_ROWS
from ..kernels.int8 import dequantize_int8, int8_grouped_linear, int8_linear

Matrix = tuple[int, int]  # out, in
Parts = dict[str, torch.Tensor]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """What the header has to say of a tensor; a shape of None stands for any."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Layout(ABC):
    """Two layouts that are equal can be stacked."""

    grouped: ClassVar[bool] = False  # whether there is a product of sorted rows with the experts' packed weights

    @abstractmethod
    def stored(self, matrix: Matrix) -> dict[str, Stored]:
        """What lies in the file for a linear layer, under its name and these suffixes: ".weight" and so on."""

    @abstractmethod
    def parts(self, matrix: Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what is kept of it in memory, in whose names there is no dot."""

    def read(self, part: str, matrix: Matrix, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A part, out of the file's tensors by suffix. ValueError where their content does not fit."""
        return tensor(f".{part}")

    def write(self, parts: Parts, matrix: Matrix) -> dict[str, torch.Tensor]:
        """The file's tensors by suffix, equal byte for byte to those that the parts were read from."""
        return {f".{part}": tensor for part, tensor in parts.items()}

    @abstractmethod
    def dequantize(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        """Parts with a leading `n` -> `[n, out, in]`, the product of code and scale rounded once to `dtype`."""

    def linear(self, x: torch.Tensor, parts: Parts, matrix: Matrix, cache: dict) -> torch.Tensor | None:
        """`x [M, in]` times the weight, differentiable in x; None where dequantizing it is the way.

        `cache` is the weight's own, for what is made of its parts once per device."""
        return None

    def grouped_linear(self, x: torch.Tensor, parts: Parts, offsets: torch.Tensor, cache: dict) -> torch.Tensor:
        """If `grouped`: `x [M, in]` sorted by expert, parts stacked over experts and, in each, over its matrices ->
        `[M, all outputs]`; expert e has the rows from `offsets[e]` to `offsets[e + 1]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class FP8Blocks(Layout):
    """DeepSeek's own: E4M3 and a scale per block, which is smaller at the edges, by which it is multiplied."""

    block: tuple[int, int]
    scale_dtype: torch.dtype

    def _grid(self, matrix: Matrix) -> tuple[int, int]:
        return -(-matrix[0] // self.block[0]), -(-matrix[1] // self.block[1])

    def stored(self, matrix: Matrix) -> dict[str, Stored]:
        return {
            ".weight": Stored(("F8_E4M3",), matrix),
            ".weight_scale_inv": Stored(("F32", "BF16"), self._grid(matrix)),
        }

    def parts(self, matrix: Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            "weight": (torch.float8_e4m3fn, matrix),
            "weight_scale_inv": (self.scale_dtype, self._grid(matrix)),
        }

    def dequantize(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        codes, scale = parts["weight"], parts["weight_scale_inv"].float()
        if self.block == (TILE, TILE) and _multiplies_e4m3(codes):
            return dequantize_weight_fp8(codes, scale, dtype)
        output = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        rows, columns = self.block
        columns_of = scale.repeat_interleave(columns, dim=-1)[..., : matrix[1]]
        for i in range(scale.shape[-2]):  # a row of blocks stays in a CPU's cache
            part = slice(i * rows, (i + 1) * rows)
            output[:, part] = _e4m3_to_fp32(codes[:, part]).mul_(columns_of[:, i : i + 1])
        return output

    def linear(self, x: torch.Tensor, parts: Parts, matrix: Matrix, cache: dict) -> torch.Tensor | None:
        """As the official inference code: activations in 1x128 tiles, on GPUs that multiply E4M3."""
        if self.block != (TILE, TILE) or torch.is_grad_enabled() or not _multiplies_e4m3(x):
            return None
        codes, scale = quantize_activation_fp8(x)
        return fp8_gemm(codes, scale, parts["weight"], parts["weight_scale_inv"].float(), x.dtype)


def _multiplies_e4m3(x: torch.Tensor) -> bool:
    """Whether x's device has E4M3: the kernels of `fp8_quant` and `fp8_gemm` do not compile for others."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _e4m3_to_fp32(codes: torch.Tensor) -> torch.Tensor:
    """On a CPU a table is twice as fast as torch's conversion."""
    if codes.device.type != "cpu":
        return codes.float()
    index = codes.contiguous().view(torch.uint8).flatten().int()
    return torch.index_select(_E4M3, 0, index).view(codes.shape)


@dataclass(frozen=True)
class PackedInt4(Layout):
    """compressed-tensors' `pack-quantized` W4A16: symmetric, a scale per group of consecutive inputs."""

    group_size: int
    scale_dtype: torch.dtype
    grouped: ClassVar[bool] = True

    def stored(self, matrix: Matrix) -> dict[str, Stored]:
        out, width = matrix
        return {
            ".weight_packed": Stored(("I32",), (out, -(-width // 8))),
            ".weight_scale": Stored(("BF16", "F16", "F32"), (out, -(-width // self.group_size))),
            ".weight_shape": Stored(("I64",), (2,)),
        }

    def parts(self, matrix: Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        out, width = matrix
        return {
            "weight_packed": (torch.int32, (out, width // 8)),
            "weight_scale": (self.scale_dtype, (out, width // self.group_size)),
        }

    def read(self, part: str, matrix: Matrix, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if part == "weight_packed" and (shape := tensor(".weight_shape").tolist()) != list(matrix):
            raise ValueError(f"weight_shape holds {shape}, the configuration needs {list(matrix)}")
        return super().read(part, matrix, tensor)

    def write(self, parts: Parts, matrix: Matrix) -> dict[str, torch.Tensor]:
        return super().write(parts, matrix) | {".weight_shape": torch.tensor(matrix)}

    def dequantize(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_int4(parts["weight_packed"], parts["weight_scale"], dtype)

    def linear(self, x: torch.Tensor, parts: Parts, matrix: Matrix, cache: dict) -> torch.Tensor:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        return int4_linear(x, packed, scale, self._for_cpu(x, packed, scale, cache))

    def grouped_linear(self, x: torch.Tensor, parts: Parts, offsets: torch.Tensor, cache: dict) -> torch.Tensor:
        packed, scale = (parts[name].flatten(1, 2) for name in ("weight_packed", "weight_scale"))
        return int4_grouped_linear(x, packed, scale, offsets, self._for_cpu(x, packed, scale, cache))

    def _for_cpu(self, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, cache: dict) -> CpuPacked | None:
        """For decoding on a CPU: the weight once more (4 bits), made in the first step."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or len(x) > CPU_KERNEL_ROWS:
            return None
        if "cpu" not in cache:
            cache["cpu"] = pack_int4_for_cpu(packed, scale)
        return cache["cpu"]


@dataclass(frozen=True)
class Int8Channels(Layout):
    """compressed-tensors' `int-quantized`: symmetric, a scale per output; with `dynamic` the layer's input is
    quantized per token too (W8A8)."""

    dynamic: bool
    scale_dtype: torch.dtype

    @property
    def grouped(self) -> bool:  # type: ignore[override]
        return self.dynamic

    def stored(self, matrix: Matrix) -> dict[str, Stored]:
        return {
            ".weight": Stored(("I8",), matrix),
            ".weight_scale": Stored(("BF16", "F16", "F32"), (matrix[0], 1)),
        }

    def parts(self, matrix: Matrix) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weight": (torch.int8, matrix), "weight_scale": (self.scale_dtype, (matrix[0], 1))}

    def dequantize(self, parts: Parts, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_int8(parts["weight"], parts["weight_scale"], dtype)

    def linear(self, x: torch.Tensor, parts: Parts, matrix: Matrix, cache: dict) -> torch.Tensor | None:
        return int8_linear(x, parts["weight"], parts["weight_scale"]) if self.dynamic else None

    def grouped_linear(self, x: torch.Tensor, parts: Parts, offsets: torch.Tensor, cache: dict) -> torch.Tensor:
        return int8_grouped_linear(x, parts["weight"].flatten(1, 2), parts["weight_scale"].flatten(1, 2), offsets)
