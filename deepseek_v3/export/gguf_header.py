"""The header of a GGUF file, read with bounds: no allocation and no loop is as long as a stranger's file says."""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, Keys

VERSIONS = (2, 3)
# An array of strings is as long as the vocabulary or its merges; V3's has 129,280. A layer has some 20 tensors.
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 4096, 2**17, 2**21
MAX_NAME, MAX_DIMENSIONS, MAX_ALIGNMENT = 64, 4, 2**20  # ggml's own limits, and a sane one
SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


class TensorInfo(NamedTuple):
    """`shape`: slowest dimension first; `start`: first byte in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


class _Cursor:
    """Reads from front to back; every error names the file and what was being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.what = path, data, 0, "header"

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {self.what}: {problem}")

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        start, left = self.position, len(self.data) - self.position
        if count > left:
            raise self.fail(f"{count:,} bytes from byte {start:,} on, but only {left:,} are left (truncated file?)")
        self.position += count
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def count(self, limit: int, name: str) -> int:
        found = self.number("<Q")
        if found > limit:
            raise self.fail(f"{name} is {found:,}, allowed are at most {limit:,}")
        return found

    def string(self, limit: int | None = None) -> str:
        length = self.count(len(self.data) if limit is None else limit, "length of a string")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"text that is not UTF-8 ({error})") from None

    def value_type(self) -> GGUFValueType:
        found = self.number("<I")
        if found not in GGUFValueType._value2member_map_:
            raise self.fail(f"value type is {found}, allowed are 0 to {max(GGUFValueType)}")
        return GGUFValueType(found)

    def value(self) -> Any:
        """A scalar or a string. Arrays are passed over, their length is returned in a tuple."""
        kind = self.value_type()
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.FLOAT32:  # the shortest decimal that is this number: 1e-06, not 9.99999997e-07
            return float(str(np.float32(self.number("<f"))))
        if kind != GGUFValueType.ARRAY:
            return self.number(SCALARS[kind])
        inner = self.value_type()
        if inner == GGUFValueType.ARRAY:
            raise self.fail("an array of arrays, allowed are arrays of numbers and strings")
        if inner == GGUFValueType.STRING:
            count = self.count(MAX_STRINGS, "number of strings")
            for _ in range(count):
                self.take(self.count(len(self.data), "length of a string"))
        else:
            count = self.count(len(self.data), "number of elements")
            self.take(count * struct.calcsize(SCALARS[inner]))
        return (count,)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata (key -> value; of arrays only the length, as a tuple) and tensors (name -> where and what it is).

    Raises:
        ValueError: not a whole little-endian GGUF file; names the file and the key or tensor, with what is allowed.
    """
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: header: found {path.stat().st_size} bytes, a GGUF file has at least 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        if (magic := cursor.number("<I")) != GGUF_MAGIC:
            raise cursor.fail(f"begins with {magic:#x}, a GGUF file with {GGUF_MAGIC:#x} ('GGUF')")
        if (version := cursor.number("<I")) not in VERSIONS:
            raise cursor.fail(f"version is {version}, allowed are {VERSIONS} in little-endian order")
        n_tensors = cursor.count(MAX_TENSORS, "number of tensors")
        n_keys = cursor.count(MAX_KEYS, "number of keys")
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            cursor.what = f"key {i}"
            key = cursor.string(limit=2**16)
            cursor.what = f"key {key:.200}"
            if key in metadata:
                raise cursor.fail("is there twice")
            metadata[key] = cursor.value()
        return metadata, _read_tensors(cursor, n_tensors, metadata)


def _read_tensors(cursor: _Cursor, n_tensors: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for i in range(n_tensors):
        cursor.what = f"tensor {i}"
        name = cursor.string(limit=MAX_NAME)
        cursor.what = f"tensor {name}"
        if name in tensors:
            raise cursor.fail("is there twice")
        n_dimensions = cursor.number("<I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise cursor.fail(f"has {n_dimensions} dimensions, allowed are 1 to {MAX_DIMENSIONS}")
        shape = tuple(cursor.count(2**40, "a dimension") for _ in range(n_dimensions))[::-1]
        if 0 in shape:
            raise cursor.fail(f"is {list(shape)}, allowed are dimensions from 1 on")
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise cursor.fail(f"type is {kind}, which is none of ggml's")
        info = TensorInfo(shape, GGMLQuantizationType(kind), offset)
        if shape[-1] % (block := GGML_QUANT_SIZES[info.kind][0]):
            raise cursor.fail(f"rows of {shape[-1]} in {info.kind.name}, allowed are multiples of {block}")
        tensors[name] = info

    cursor.what = f"key {Keys.General.ALIGNMENT}"
    alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"is {alignment!r:.100}, allowed are powers of two up to {MAX_ALIGNMENT:,}")
    data_start = -(-cursor.position // alignment) * alignment
    position, size = 0, len(cursor.data)
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        cursor.what = f"tensor {name}"
        if info.start < position or info.start % alignment:
            raise cursor.fail(f"offset is {info.start:,}, allowed are multiples of {alignment} from {position:,} on")
        position = info.start + info.n_bytes
        if data_start + position > size:
            end = data_start + position
            raise cursor.fail(f"ends at byte {end:,}, but the file at {size:,} (truncated file?)")
    return {name: info._replace(start=data_start + info.start) for name, info in tensors.items()}
