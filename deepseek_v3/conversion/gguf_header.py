"""The head of a GGUF file, checked before anything else reads the file.

Layout (little endian): "GGUF", version, number of tensors, number of metadata fields; the fields; name, shape, type
and offset of each tensor; padding; the data. Readers trust the numbers in it.
"""

import struct
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_HEAD_BYTES = 2**28
MAX_FIELDS, MAX_TENSORS, MAX_ITEMS, MAX_DIMENSIONS = 2**12, 2**17, 2**21, 4
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class GGUFHead(NamedTuple):
    """What a file says of itself.

    Attributes:
        fields: key -> a number, a string (of at most 1000 characters), or the number of entries of an array.
        elements: of all tensors.
    """

    fields: dict[str, int | float | str]
    elements: int


class _Head:
    """Reads forward, and names the offset in every error."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.end = path, file, min(path.stat().st_size, MAX_HEAD_BYTES)

    def fail(self, field: str, found: object, allowed: str) -> ValueError:
        where = f"{self.path}: {field:.200} before byte {self.file.tell()}"
        return ValueError(f"{where} is {found!r:.100}, allowed {allowed}")

    def take(self, count: int, field: str) -> bytes:
        if count > self.end - self.file.tell():
            raise self.fail(field, f"{count} bytes long", f"are {max(self.end - self.file.tell(), 0)} more bytes")
        return self.file.read(count)

    def number(self, layout: str, field: str, limit: int | None = None) -> int:
        (value,) = struct.unpack(f"<{layout}", self.take(struct.calcsize(layout), field))
        if limit is not None and value > limit:
            raise self.fail(field, value, f"are 0 to {limit}")
        return value

    def text(self, field: str) -> str:
        raw = self.take(self.number("Q", f"the length of {field}"), field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(field, raw[:40], "is UTF-8") from None

    def value(self, kind: int, field: str) -> int | float | str:
        if kind == _STRING:
            return self.text(field)[:1000]
        if kind in _SCALAR_BYTES:
            return struct.unpack("<" + "BbHhIif?QQqd"[kind], self.take(_SCALAR_BYTES[kind], field))[0]
        raise self.fail(f"the type of {field}", kind, "are 0 to 12")

    def array(self, field: str) -> int:
        kind = self.number("I", f"the item type of {field}")
        count = self.number("Q", f"the number of items of {field}", MAX_ITEMS)
        if kind in _SCALAR_BYTES:
            self.take(count * _SCALAR_BYTES[kind], field)
        elif kind == _STRING:
            for _ in range(count):
                self.take(self.number("Q", f"the length of an item of {field}"), field)
        else:
            raise self.fail(f"the item type of {field}", kind, "are scalars and strings")
        return count


def read_head(path: str | PathLike[str]) -> GGUFHead:
    """Check a GGUF file's head; no tensor is read.

    Raises:
        ValueError: not a GGUF file, or a count, length, shape or offset that the file cannot hold; names the file, the
            field and the position.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = _Head(path, file)
        if (magic := head.take(4, "the magic number")) != b"GGUF":
            raise head.fail("the magic number", magic, "is b'GGUF'")
        if (version := head.number("I", "the version")) not in VERSIONS:
            raise head.fail("the version", version, f"are {' and '.join(map(str, VERSIONS))}")
        tensors = head.number("Q", "the number of tensors", MAX_TENSORS)
        count = head.number("Q", "the number of metadata fields", MAX_FIELDS)
        fields: dict[str, int | float | str] = {}
        for _ in range(count):
            key = head.text("a metadata key")
            if key in fields:
                raise head.fail("a metadata key", key, "is each once")
            kind = head.number("I", f"the type of {key}")
            fields[key] = head.array(key) if kind == _ARRAY else head.value(kind, key)
        spans, names, elements = [], set(), 0
        for _ in range(tensors):
            name = head.text("the name of a tensor")
            if not name or name in names:
                raise head.fail("the name of a tensor", name, "are names, each once")
            names.add(name)
            size = 1
            for _ in range(head.number("I", f"{name}: the number of dimensions", MAX_DIMENSIONS)):
                size *= head.number("Q", f"{name}: a dimension", 2**40)
            head.number("I", f"{name}: the type")
            spans.append((head.number("Q", f"{name}: the offset"), size, name))
            elements += size
        # An element of the densest type takes more than a bit, so this bounds what the tensors can grow to.
        space = path.stat().st_size - file.tell()
        spans.sort()
        following = [offset for offset, _, _ in spans[1:]] + [space]
        for (offset, size, name), end in zip(spans, following, strict=True):
            if offset + size // 8 > end:
                allowed = f"is room for {size} elements before byte {end} of the data"
                raise head.fail(f"{name}: the offset", offset, allowed)
        return GGUFHead(fields, elements)
