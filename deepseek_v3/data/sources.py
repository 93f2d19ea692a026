"""Where documents come from: the Python standard library, files on disk, or the `datasets` library.

Each reader returns documents in a deterministic order, with names that do not depend on where the corpus lies on the
machine: the split hashes names, so moving a folder must not move a document from training to held-out.
"""

import glob
import gzip
import json
import lzma
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
DATASETS_PREFIX = "datasets:"

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Marks of generated files under encodings/: 1.3 MB of "\x80 -> EURO SIGN" tables, and two dozen copies of one template
# that would fall on both sides of the split.
_GENERATED_CODEC_MARKS = ("decoding_table = (", "decoding_map", "getcodec(")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its identity.

    Attributes:
        name: relative path, or ``path:line`` for a JSON Lines record.
        text: the text, decoded.
        group: documents of one group stay on the same side of the train/held-out split. None: alone.
    """

    name: str
    text: str
    group: str | None = None


def read_stdlib() -> list[Document]:
    """The embedded default: the sources and the language reference of the running Python (about 10 MB, PSF-2.0).

    Docstrings are not added as documents of their own: they are inside the sources already, and a second copy could
    put the docstring of a held-out module into the training split. The topics of the language reference quote each
    other, so they form one group of the split. Left out: tests, installed packages, generated codecs, and build
    records (``config-*``, ``_sysconfigdata*``), which would make the text depend on the machine.

    Raises:
        ValueError: this Python keeps no readable library sources (zipped or frozen builds).
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    group = "pydoc_data/topics"
    documents = [Document(f"{group}#{topic}", text, group) for topic, text in sorted(topics.items())]
    sources = [Document(name, _read_python(path)) for name, path in _stdlib_files(root)]
    if not sources:
        raise ValueError(f"source 'stdlib': no .py files under {root}; is this Python's library zipped?")
    return documents + [doc for doc in sources if not _is_generated_codec(doc)]


def read_files(source: str, text_field: str) -> list[Document]:
    """Read a text file, a JSON Lines file, a folder (recursively, `TEXT_SUFFIXES`) or a glob (any suffix).

    A trailing ``.gz`` or ``.xz`` is decompressed. A text file is one document; each line of a ``.jsonl`` file is one.

    Raises:
        ValueError: nothing found, a file that is not UTF-8 (with the byte offset), a line that is not a JSON object
            with the string field `text_field`, or whose text is not Unicode (as ``file:line``).
    """
    root, paths = find_files(source)
    return [doc for path in paths for doc in _read_file(path, path.relative_to(root).as_posix(), text_field)]


def read_datasets(source: str, text_field: str) -> tuple[list[Document], str | None]:
    """Read ``datasets:NAME[:CONFIG[:SPLIT]]`` with the `datasets` library; the split defaults to ``train``.

    NAME is what `datasets.load_dataset` takes (a Hub name or a local folder), or a folder written by `save_to_disk`.
    Where that holds a lone `Dataset`, the default is the split that it is; CONFIG only names the documents.

    Returns:
        The documents, named ``NAME[:CONFIG]:SPLIT:ROW``, of a local folder its last part as NAME; and the licence
        recorded in the dataset, if any.

    Raises:
        ValueError: malformed source, `datasets` not installed, unknown split or column, data that it cannot read, or
            a row without text.
    """
    name, config, split = parse_datasets(source)
    loaded = load_datasets(source, name, config, split, default="train")
    if text_field not in loaded.column_names:
        raise ValueError(f"source {source!r}: column {text_field!r} not found; it has {loaded.column_names}")
    label = Path(name).resolve().name if Path(name).exists() else name
    prefix = ":".join(part for part in (label, config, split or "train") if part)
    documents = []
    for row, text in enumerate(loaded[text_field]):
        if not isinstance(text, str):
            raise ValueError(f"source {source!r}: row {row}, column {text_field!r}: expected text, found {text!r:.60}")
        documents.append(Document(f"{prefix}:{row}", text))
    return documents, loaded.info.license or None


def parse_datasets(source: str) -> tuple[str, str, str]:
    """(NAME, CONFIG, SPLIT) of ``datasets:NAME[:CONFIG[:SPLIT]]``; empty text where a part is not given.

    Raises:
        ValueError: no name, or more than three parts.
    """
    name, *rest = source.removeprefix(DATASETS_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"source {source!r}: expected {DATASETS_PREFIX}NAME[:CONFIG[:SPLIT]]")
    config, split = (rest + ["", ""])[:2]
    return name, config, split


def load_datasets(source: str, name: str, config: str, split: str, default: str = "") -> Any:
    """The `Dataset` of one split. Where `split` is empty: the lone `Dataset` that `save_to_disk` wrote, else the split
    `default`, or, if that is empty, too, all splits as a `DatasetDict`.

    Raises:
        ValueError: `datasets` not installed, no such split, or files that `datasets` cannot read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"source {source!r} needs the datasets library: pip install datasets") from error

    if not any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        try:
            return datasets.load_dataset(name, config or None, split=split or default or None)
        except datasets.exceptions.DatasetsError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise ValueError(f"source {source!r}: {error}{cause}") from error
    loaded = datasets.load_from_disk(name)
    lone = not isinstance(loaded, datasets.DatasetDict)
    splits = {str(loaded.split or "train"): loaded} if lone else loaded
    wanted = split if lone else split or default
    if not wanted:
        return loaded
    if wanted not in splits:
        raise ValueError(f"source {source!r}: split {wanted!r} not found; it has {sorted(splits)}")
    return splits[wanted]


def find_files(source: str, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> tuple[Path, list[Path]]:
    """The files of a path, a folder (only `suffixes`, recursively) or a glob, sorted, and the folder names start at.

    Raises:
        ValueError: nothing found.
    """
    path = Path(source)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and plain_suffix(p) in suffixes]
        if not found:
            endings = ", ".join(suffixes)
            raise ValueError(f"{source}: no file in this folder ends in {endings} (plain, .gz or .xz); try a glob")
        return path, sorted(found, key=lambda p: p.relative_to(path).as_posix())
    if glob.has_magic(source):
        found = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
        if not found:
            raise ValueError(f"{source}: the pattern matches no file")
        fixed = []
        for part in path.parts:
            if glob.has_magic(part):
                break
            fixed.append(part)
        return Path(*fixed), sorted(found, key=lambda p: p.as_posix())
    raise ValueError(
        f"{source}: no such file or folder (other sources: 'stdlib', a glob, or '{DATASETS_PREFIX}NAME:CONFIG:SPLIT')"
    )


def plain_suffix(path: Path) -> str:
    """The suffix below a trailing ``.gz`` or ``.xz``."""
    return path.with_suffix("").suffix if path.suffix in _OPENERS else path.suffix


def read_bytes(path: Path) -> bytes:
    """The file's content, decompressed.

    Raises:
        ValueError: it cannot be read or decompressed.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """The file's text, decompressed, line ends as they are, without a byte order mark.

    Raises:
        ValueError: unreadable, or not UTF-8 (with the byte offset).
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # the mark that Windows' programs write
    except UnicodeDecodeError as error:
        found = data[error.start]
        raise ValueError(f"{path}: not UTF-8: byte 0x{found:02x} at byte offset {error.start}") from error


def check_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair: JSON can spell it (``"\\ud83d"``), UTF-8 and tokenizers cannot take it.

    Raises:
        ValueError: beginning with `where`, with the character and its offset.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise ValueError(f"{where}: found {found} at character {error.start}, allowed is Unicode text") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line of a JSON Lines file that is not blank.

    Raises:
        ValueError: a line that is not JSON, as ``file:line``.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines() also cuts at U+2028
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; deep nesting
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error


def _stdlib_files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if _SKIPPED_FOLDERS.intersection(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        name = path.relative_to(root).as_posix()
        if not path.name.startswith("_sysconfigdata") and name != "pydoc_data/topics.py":
            yield name, path


def _read_python(path: Path) -> str:
    with tokenize.open(path) as file:  # honours the source's own coding line
        return file.read()


def _is_generated_codec(doc: Document) -> bool:
    return doc.name.startswith("encodings/") and any(mark in doc.text for mark in _GENERATED_CODEC_MARKS)


def _read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    if plain_suffix(path) == ".jsonl":
        for number, record in json_lines(path):
            yield Document(f"{name}:{number}", _text_of(record, f"{path}:{number}", text_field))
    else:
        yield Document(name, read_text(path))


def _text_of(record: Any, where: str, text_field: str) -> str:
    if not isinstance(record, dict) or text_field not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: field {text_field!r} not found; found {found}")
    if not isinstance(record[text_field], str):
        raise ValueError(f"{where}: field {text_field!r} must be a string, found {type(record[text_field]).__name__}")
    check_unicode(record[text_field], f"{where}: field {text_field!r}")
    return record[text_field]
