"""The header of a GGUF file, read with bounds: no allocation and no loop is as long as a stranger's file says.

Layout (little endian): "GGUF", version, number of tensors, number of metadata keys; the keys; name, shape, type and
offset of each tensor; padding; the data. Readers trust the numbers in it, so this one comes first.
"""

import math
import mmap
import struct
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER_BYTES = 2**28
# An array of strings is as long as the vocabulary or its merges; V3's has 129,280. A layer has some 20 tensors.
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 4096, 2**17, 2**21
MAX_NAME, MAX_DIMENSIONS, MAX_ALIGNMENT = 64, 4, 2**20  # ggml's own limits, and a sane one
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
STRING, ARRAY, FLOAT32 = 8, 9, 6
# value types of metadata, by number, with their layout
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", FLOAT32: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
# ggml's types of tensors: number -> name, elements of a block, bytes of a block
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


class TensorInfo(NamedTuple):
    """`shape`: slowest dimension first; `kind`: ggml's number of the type; `start`: first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def n_bytes(self) -> int:
        _, block, size = TYPES[self.kind]
        return math.prod(self.shape) // block * size


class GGUFHeader(NamedTuple):
    """What a file says of itself.

    Attributes:
        metadata: key -> a number or a string; of an array only the length, as a tuple.
        tensors: name -> where and what it is.
        n_bytes: of the header, up to the padding before the data.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    n_bytes: int


class _Cursor:
    """Reads from front to back; every error names the file and what was being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.what = path, data, 0, "header"
        self.end = min(len(data), MAX_HEADER_BYTES)

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {self.what}: {problem}")

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        start, left = self.position, self.end - self.position
        if count > left:
            why = "truncated file?" if self.end == len(self.data) else f"a header has at most {self.end:,}"
            raise self.fail(f"{count:,} bytes from byte {start:,} on, but only {left:,} are left ({why})")
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
        length = self.count(self.end if limit is None else limit, "length of a string")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"text that is not UTF-8 ({error})") from None

    def value_type(self) -> int:
        found = self.number("<I")
        if found not in SCALARS and found not in (STRING, ARRAY):
            raise self.fail(f"value type is {found}, allowed are 0 to {max(SCALARS)}")
        return found

    def value(self) -> Any:
        """A scalar or a string. Arrays are passed over, their length is returned in a tuple."""
        kind = self.value_type()
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            value = self.number(SCALARS[kind])
            return _shortest(value) if kind == FLOAT32 and math.isfinite(value) else value
        inner = self.value_type()
        if inner == ARRAY:
            raise self.fail("an array of arrays, allowed are arrays of numbers and strings")
        if inner == STRING:
            count = self.count(MAX_STRINGS, "number of strings")
            for _ in range(count):
                self.take(self.count(self.end, "length of a string"))
        else:
            count = self.count(self.end, "number of elements")
            self.take(count * struct.calcsize(SCALARS[inner]))
        return (count,)


def _shortest(value: float) -> float:
    """The shortest decimal that is this single-precision number: 1e-06, not 9.99999997e-07."""
    # six digits are never more than needed, but for subnormal numbers
    for digits in range(6 if abs(value) > 1e-37 else 1, 9):
        decimal = float(f"{value:.{digits}g}")
        if struct.pack("<f", decimal) == struct.pack("<f", value):
            return decimal
    return float(f"{value:.9g}")


def read_header(path: str | PathLike[str]) -> GGUFHeader:
    """Check a GGUF file's header and read it; no tensor is read.

    Raises:
        ValueError: not a whole little-endian GGUF file; names the file and the key or tensor, with what is allowed.
    """
    path = Path(path)
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: header: found {path.stat().st_size} bytes, a GGUF file has at least 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        if (magic := data[cursor.take(4) : cursor.position]) != MAGIC:
            raise cursor.fail(f"begins with {magic!r}, a GGUF file with {MAGIC!r}")
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
        tensors = _read_tensors(cursor, n_tensors)
        return GGUFHeader(metadata, _placed(cursor, tensors, metadata), cursor.position)


def _read_tensors(cursor: _Cursor, n_tensors: int) -> dict[str, TensorInfo]:
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
        if kind not in TYPES:
            raise cursor.fail(f"type is {kind}, which is none of ggml's")
        label, block, _ = TYPES[kind]
        if shape[-1] % block:
            raise cursor.fail(f"rows of {shape[-1]} in {label}, allowed are multiples of {block}")
        tensors[name] = TensorInfo(shape, kind, offset)
    return tensors


def _placed(cursor: _Cursor, tensors: dict[str, TensorInfo], metadata: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensors with their first byte in the file instead of that in the data."""
    cursor.what = f"key {ALIGNMENT_KEY}"
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
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
