"""Where the bytes of a checkpoint's tensors lie, and what an official tensor is made from.

Bytes are read into fresh memory. A tensor over a memory map would stay resident for as long as the system likes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..modeling_deepseek_v3.weight_files import TensorEntry

# safetensors' names of the types that a checkpoint of this architecture can hold
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
PLAIN = ("BF16", "F16", "F32", "F64")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes as they lie in a file; without copying those of a contiguous tensor."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class Region(NamedTuple):
    """Consecutive bytes of a file that are one tensor; a part of a stored tensor, or all of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file

    def read(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        if tensor.numel() == 0:
            return tensor
        view = bytes_of(tensor)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self.file}: ends before byte {self.start + len(view)}, inside a tensor")
                done += count
        return tensor

    def rows(self, first: int, count: int) -> "Region":
        """The region of `count` indices of the first dimension."""
        inner = torch.Size(self.shape[1:])
        size = inner.numel() * DTYPES[self.dtype].itemsize
        return Region(self.file, self.dtype, (count, *inner), self.start + first * size)


def regions(entries: Mapping[str, TensorEntry]) -> dict[str, Region]:
    """Where each tensor lies, from headers that `scan_folder` has checked."""
    found: dict[str, Region] = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, info in header.items():
            if name in entries:
                start = 8 + length + info["data_offsets"][0]
                found[name] = Region(file, entries[name].dtype, entries[name].shape, start)
    return found


@dataclass(frozen=True)
class Stored:
    """An official tensor: `decode` makes it from the tensors of its regions."""

    regions: tuple[Region, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[..., torch.Tensor]

    def read(self) -> torch.Tensor:
        return self.decode(*(region.read() for region in self.regions))

    @property
    def entry(self) -> TensorEntry:
        """As if the tensor lay there in plain form."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return TensorEntry(self.regions[0].file, names[self.dtype], self.shape)


def plain(region: Region) -> Stored:
    return Stored((region,), region.shape, DTYPES[region.dtype], _identity)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
