"""A folder of safetensors files, checked before a byte of a tensor is read.

Nothing here executes or unpickles what it reads, memory is bounded by the headers, and every error names the file.
"""

import json
import re
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
# Of a header or an index. One file with all 275,225 tensors of the 671B model in NF4 would have a header of 39 MB with
# 3.3 million of these characters; in FP8 it is a third of that. Parsing needs some 100 bytes for each of them.
MAX_JSON_BYTES, MAX_ITEMS = 2**26, 2**22
# bytes per element; the subset of safetensors' types that a checkpoint of this architecture can hold
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I8": 1, "U8": 1}


_FILE_NAME = re.compile(r"[ -~]{1,240}\.safetensors")  # printable ASCII


class TensorEntry(NamedTuple):
    """Where a tensor lies and what its header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n, count in Counter(names).items() if count > 1)!r:.200}")
    return result


def read_json(path: Path) -> object:
    """Parse a JSON file without duplicate keys; `ValueError` names the file."""
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: found over {MAX_JSON_BYTES} bytes, allowed {MAX_JSON_BYTES}")
    return _parse(raw, str(path))


def _parse(raw: bytes, where: str) -> object:
    if (items := sum(map(raw.count, (b"[", b"{", b":", b",")))) > MAX_ITEMS:
        raise ValueError(f"{where}: found {items} brackets, colons and commas, allowed {MAX_ITEMS}")
    try:
        return json.loads(raw, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, duplicate keys, integers of thousands of digits
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; `ValueError` if its header and its size do not describe a whole file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if size < 8 or header_bytes > min(MAX_JSON_BYTES, size - 8):
            raise ValueError(
                f"{path}: not a whole safetensors file: {size} bytes with a header of {header_bytes} bytes "
                f"(at most {MAX_JSON_BYTES}, and within the file)"
            )
        raw = file.read(header_bytes)
    header = _parse(raw, f"{path}: the safetensors header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is a {type(header).__name__}, not an object")

    entries: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    data_bytes = size - 8 - header_bytes
    for name, info in header.items():
        if name == "__metadata__":
            if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
                raise ValueError(f"{path}: __metadata__ is {info!r:.100}, allowed is an object of texts")
            continue
        entry, (start, stop) = _entry(path, name, info, data_bytes)
        entries[name] = entry
        spans.append((start, stop, name))
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            problem = f"data starts at byte {start}, but the tensors before it end at {position}"
            raise ValueError(f"{path}: {name:.200}: {problem}")
        position = stop
    if position != data_bytes:
        raise ValueError(f"{path}: holds {data_bytes} bytes of data, its header describes {position}")
    return entries


def _entry(path: Path, name: str, info: object, data_bytes: int) -> tuple[TensorEntry, tuple[int, int]]:
    def fail(problem: str) -> ValueError:
        return ValueError(f"{path}: {name:.200}: {problem}")

    if not isinstance(info, dict):
        raise fail(f"header entry is {info!r:.100}, not an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fail(f"dtype is {dtype!r:.100}, allowed are {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 8:
        raise fail(f"shape is {shape!r:.100}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise fail(f"data_offsets are {offsets!r:.100}, not two positions")
    start, stop = offsets
    if not 0 <= start <= stop <= data_bytes:
        raise fail(f"data_offsets {start}..{stop} lie outside the file's {data_bytes} bytes of data (truncated file?)")
    expected = DTYPE_BYTES[dtype]
    for n in shape:
        expected *= n
    if stop - start != expected:
        raise fail(f"{stop - start} bytes of data, but shape {shape} of {dtype} needs {expected}")
    return TensorEntry(path, dtype, tuple(shape)), (start, stop)


def _inside(folder: Path, file: Path) -> bool:
    """Whether `file` really lies in `folder`; a Hub cache's snapshots are links into the `blobs` beside them."""
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    return any(file.resolve().is_relative_to(root) for root in roots)


def weight_names(variant: str | None = None) -> tuple[str, str]:
    """The file of a checkpoint that is not sharded, and the index of one that is; as transformers names variants."""
    middle = f".{variant}" if variant else ""
    return WEIGHTS_NAME.replace(".safetensors", f"{middle}.safetensors"), INDEX_NAME.replace(".json", f"{middle}.json")


def scan_folder(folder: Path, variant: str | None = None) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, sharded or not; but the frequencies of RoPE, which some files hold per layer
    (Moonlight's) and the configuration tells.

    Raises:
        ValueError: no safetensors weights, an index that is malformed, names a file outside the folder, misses a file
            or a tensor, or a file that is not whole.
    """
    single, index = (folder / name for name in weight_names(variant))
    if not index.exists():
        if single.exists():
            if not _inside(folder, single):
                raise ValueError(f"{single}: links to {single.resolve()}, outside the model folder")
            return _without_frequencies(read_header(single))
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"found {', '.join(pickles)}, but only safetensors are read" if pickles else "no weights found"
        raise ValueError(f"{folder}: {found}; expected {single.name} or {index.name}")

    if single.exists():  # transformers would read this one, whatever the index says
        raise ValueError(f"{folder}: has {single.name} and {index.name}; allowed is one, delete that of an older save")
    content = read_json(index)
    weight_map, metadata = None, None
    if isinstance(content, dict):
        weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {type(weight_map).__name__}, not a map of tensor to file")
    files: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        if not (isinstance(file_name, str) and _FILE_NAME.fullmatch(file_name)):
            where = f"{index}: weight_map[{name!r:.200}]"
            raise ValueError(f"{where} = {file_name!r:.100} is not the name of a safetensors file")
        if file_name in files:
            continue
        file = folder / file_name
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts or not _inside(folder, file):
            raise ValueError(f"{index}: weight_map[{name!r}] = {file_name!r} leaves the model folder")
        if not file.is_file():
            raise ValueError(f"{index}: weight_map[{name!r}] = {file_name!r}, but {folder} has no such file")
        files[file_name] = file
    if not isinstance(metadata, dict):  # transformers writes into it
        raise ValueError(f"{index}: metadata is {metadata!r:.100}, allowed is an object, {{}} for example")
    entries: dict[str, TensorEntry] = {}
    for file in files.values():
        for name, entry in read_header(file).items():
            if name in entries:
                raise ValueError(f"{file}: {name:.200}: is in {entries[name].file.name} too")
            entries[name] = entry
    absent = [name for name, file_name in weight_map.items() if entries.get(name, (None,))[0] != files[file_name]]
    if absent:
        name = absent[0]
        problem = f"has no tensor {name:.200}, though {index.name} says so ({len(absent)} such)"
        raise ValueError(f"{files[weight_map[name]]}: {problem}")
    return _without_frequencies(entries)


def _without_frequencies(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    return {name: entry for name, entry in entries.items() if not name.endswith(".self_attn.rotary_emb.inv_freq")}


def find_nonfinite(folder: str | PathLike[str]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, or FP8's codes of them. Reads one tensor at a time.

    Raises:
        ValueError: as `scan_folder`.
    """
    entries, found = scan_folder(Path(folder)), []
    for path in dict.fromkeys(entry.file for entry in entries.values()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    wide = tensor.float() if tensor.itemsize == 1 else tensor
                    if not wide.isfinite().all():
                        found.append(name)
    return found
