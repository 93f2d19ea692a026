"""Tables of rows for fine-tuning: JSON Lines, JSON, CSV, Parquet and text files, folders, and `datasets`."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from .sources import (
    DATASETS_PREFIX,
    find_files,
    json_lines,
    load_datasets,
    parse_datasets,
    plain_suffix,
    read_bytes,
    read_text,
)

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# Words of a file's name, or the name of a split in `datasets` -> the split.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        where: ``file:line`` (JSON Lines, CSV), ``file: row N`` from 1 (JSON, Parquet), the file (text), or
            ``datasets:NAME...: row N``: what an error about the row begins with.
        fields: column name -> value. Values of CSV are text; a `ClassLabel` of `datasets` is its name.
    """

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class RowSource:
    """Rows by split.

    Attributes:
        splits: ``"train"``, ``"validation"``, ``"test"``, those that are there; or ``"all"`` alone where names of
            files (or of the dataset's splits) tell no split.
        licence: as recorded in the dataset, if any.
        left_out: files of a folder whose names tell no split while others' names do.
    """

    splits: Mapping[str, list[Row]]
    licence: str | None = None
    left_out: list[str] = field(default_factory=list)


def read_rows(source: str | PathLike[str]) -> RowSource:
    """Read a file, a folder (recursively, `ROW_SUFFIXES`), a glob, or ``"datasets:NAME[:CONFIG[:SPLIT]]"``.

    The words of a file's name tell its split (``train.jsonl``, ``pubmed_test-00001.parquet``; dev and val mean
    validation). A lone file is ``"all"``, whatever its name, and so is a single named split of `datasets`.
    A text file is one row with the column ``text``. A trailing ``.gz`` or ``.xz`` is decompressed.

    Raises:
        ValueError: naming the file and row that cannot be read, or files of which no training split can be told.
    """
    source = fspath(source)
    if source.startswith(DATASETS_PREFIX):
        return _read_datasets(source)
    root, paths = find_files(source, ROW_SUFFIXES)
    split_of = {path: _split_of(path.relative_to(root).as_posix()) for path in paths}
    if paths == [Path(source)] or not any(split_of.values()):
        return RowSource({"all": [row for path in paths for row in read_file_rows(path)]})
    splits: dict[str, list[Row]] = {}
    for path, split in split_of.items():
        if split is not None:
            splits.setdefault(split, []).extend(read_file_rows(path))
    if "train" not in splits:
        raise ValueError(f"{source}: files for {sorted(splits)}, but no file with 'train' in its name")
    return RowSource(splits, left_out=[path.relative_to(root).as_posix() for path in paths if not split_of[path]])


def read_file_rows(path: Path) -> list[Row]:
    """The rows of one file, in its order.

    Raises:
        ValueError: unknown ending, a row that cannot be read or is no object, or no row at all.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
    suffix = plain_suffix(path)
    if suffix not in readers:
        raise ValueError(f"{path}: cannot read rows from {suffix!r}; allowed: {', '.join(readers)}")
    rows = []
    for where, fields in readers[suffix](path):
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: expected an object with named fields, found {type(fields).__name__}")
        rows.append(Row(where, fields))
    if not rows:
        raise ValueError(f"{path}: no row in this file")
    return rows


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{path}:{number}", record) for number, record in json_lines(path))


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(records).__name__} (one per line: .jsonl)")
    return ((f"{path}: row {number}", record) for number, record in enumerate(records, start=1))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the whole process, 131,072 at first
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(reader, [])
        for values in reader:
            if values and len(values) != len(columns):
                raise ValueError(f"{path}:{reader.line_num}: {len(values)} values under {len(columns)} columns")
            if values:  # an empty line is none
                yield f"{path}:{reader.line_num}", dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error

    try:
        records = pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(path))).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet: {error}") from error
    return ((f"{path}: row {number}", record) for number, record in enumerate(records, start=1))


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    yield str(path), {"text": read_text(path)}


def _read_datasets(source: str) -> RowSource:
    name, config, split = parse_datasets(source)
    loaded = load_datasets(source, name, config, split)
    if hasattr(loaded, "column_names") and not isinstance(loaded, dict):
        return RowSource({"all": _dataset_rows(source, loaded)}, loaded.info.license or None)
    named = {part: SPLIT_NAMES[part] for part in loaded if part in SPLIT_NAMES}
    if "train" not in named.values():
        raise ValueError(f"source {source!r}: no split 'train', only {sorted(loaded)}; name one: NAME:CONFIG:SPLIT")
    if len(set(named.values())) < len(named):
        raise ValueError(f"source {source!r}: two splits of one meaning among {sorted(named)}")
    splits = {meaning: _dataset_rows(f"{source} {part}", loaded[part]) for part, meaning in named.items()}
    licence = next(iter(loaded.values())).info.license or None
    return RowSource(splits, licence, [part for part in loaded if part not in named])


def _dataset_rows(where: str, loaded: Any) -> list[Row]:
    names = {column: feature.names for column, feature in loaded.features.items() if hasattr(feature, "names")}
    rows = []
    for number, record in enumerate(loaded, start=1):
        for column, class_names in names.items():
            value = record[column]  # -1 and None: unlabelled
            record[column] = class_names[value] if value is not None and value >= 0 else None
        rows.append(Row(f"{where}: row {number}", record))
    return rows


def _split_of(name: str) -> str | None:
    """The split that the words of a relative file name tell, folders included; None where they tell none.

    >>> _split_of("50agree_train.jsonl"), _split_of("data/dev-00000.parquet"), _split_of("latest.csv")
    ('train', 'validation', None)
    """
    found = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES}
    if len(found) > 1:
        raise ValueError(f"{name}: the name tells more than one split: {sorted(found)}")
    return found.pop() if found else None
