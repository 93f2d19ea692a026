"""Corpora: documents without exact duplicates, split into training and held-out by a hash of their names."""

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Literal

from .sources import DATASETS_PREFIX, Document, read_datasets, read_files, read_stdlib

HELDOUT_FRACTION = 0.05  # of the documents; 3 % of the bytes of the standard library
Split = Literal["drawn by a hash of the documents' names", "the end of the one document", "a text of its own"]


@dataclass(frozen=True)
class Corpus:
    """A training and a held-out split that share no document.

    Attributes:
        name: the source, with the Python version for the standard library (its text differs per release).
        train, heldout: documents in a fixed order.
        licence: SPDX name where known.
        split: what the held-out part is.
        sha256: hash over split, name and text of every document: equal hashes mean equal training data.
        train_bytes, heldout_bytes: sizes as UTF-8, in bytes.
    """

    name: str
    train: Sequence[Document]
    heldout: Sequence[Document]
    licence: str | None
    split: Split
    sha256: str
    train_bytes: int
    heldout_bytes: int


def load_corpus(
    source: str | PathLike[str] = "stdlib",
    *,
    heldout: str | PathLike[str] | None = None,
    text_field: str = "text",
    heldout_fraction: float = HELDOUT_FRACTION,
) -> Corpus:
    """Load a corpus and split it.

    Args:
        source: ``"stdlib"`` (the Python that runs), a text or ``.jsonl`` file, a folder, a glob, or
            ``"datasets:NAME[:CONFIG[:SPLIT]]"``. Only the prefix reaches the `datasets` library, so that a mistyped
            path is an error and never a download.
        heldout: a second source with the official held-out documents. Then nothing is split by hash, and training
            documents that repeat a held-out one are removed.
        text_field: field of a ``.jsonl`` record or column of a dataset that holds the text.
        heldout_fraction: expected share of documents held out, by hash of their names (or of their `group`).

    Raises:
        ValueError: naming the file (and byte, line or field) that cannot be read, or a split that came out empty.
    """
    documents, name, licence = _read(fspath(source), text_field)
    official = None
    if heldout is not None:
        official, heldout_name, _ = _read(fspath(heldout), text_field)
        name = f"{name} | {heldout_name}"
    return build_corpus(documents, name, heldout=official, licence=licence, heldout_fraction=heldout_fraction)


def build_corpus(
    documents: Iterable[Document],
    name: str,
    *,
    heldout: Iterable[Document] | None = None,
    licence: str | None = None,
    heldout_fraction: float = HELDOUT_FRACTION,
) -> Corpus:
    """Remove blank and exactly repeated documents, then split; see `load_corpus` for the arguments.

    A lone document is cut instead, its last `heldout_fraction` held out: at a line break, or, where that would hold
    out about twice as much, between words, or else between characters.

    Raises:
        ValueError: no text at all, or nothing left in one of the splits.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must lie between 0 and 1, found {heldout_fraction}")
    seen: set[bytes] = set()
    # The official held-out split goes first: of a text in both, the held-out copy stays.
    held = _unseen(heldout, seen) if heldout is not None else []
    train = _unseen(documents, seen)
    if not train and not held:
        raise ValueError(f"corpus {name!r} is empty: no document holds any text")
    split: Split
    if heldout is not None:
        split = "a text of its own"
    elif len(train) == 1:
        split = "the end of the one document"
        train, held = _cut(train[0], heldout_fraction)
    else:
        split = "drawn by a hash of the documents' names"
        is_held = [_in_heldout(doc, heldout_fraction) for doc in train]
        held = [doc for doc, h in zip(train, is_held, strict=True) if h]
        train = [doc for doc, h in zip(train, is_held, strict=True) if not h]
    for part, left in (("train", train), ("heldout", held)):
        if not left:
            raise ValueError(
                f"corpus {name!r}: nothing left in the {part} split of {len(train) + len(held)} distinct documents; "
                f"give more documents, another heldout_fraction (now {heldout_fraction}), or a source for heldout"
            )
    return Corpus(name, train, held, licence, split, _hash(train, held), _n_bytes(train), _n_bytes(held))


def _read(source: str, text_field: str) -> tuple[list[Document], str, str | None]:
    if source == "stdlib":
        return read_stdlib(), f"python-stdlib-{platform.python_version()}", "PSF-2.0"
    if source.startswith(DATASETS_PREFIX):
        documents, licence = read_datasets(source, text_field)
        return documents, source, licence
    return read_files(source, text_field), source, None


def _unseen(documents: Iterable[Document], seen: set[bytes]) -> list[Document]:
    """Documents with text, first copy of each; `seen` collects their content hashes."""
    kept = []
    for doc in documents:
        digest = hashlib.sha256(doc.text.encode()).digest()
        if doc.text.strip() and digest not in seen:
            seen.add(digest)
            kept.append(doc)
    return kept


def _in_heldout(doc: Document, fraction: float) -> bool:
    """Whether a hash, read as a number in [0, 1), lies below `fraction`: adding documents moves no other."""
    hashed = doc.name if doc.group is None else doc.group
    return int.from_bytes(hashlib.sha256(hashed.encode()).digest()[:8], "big") < fraction * 2**64


def _cut(doc: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    text = doc.text
    cut = int(len(text) * (1 - fraction))
    earliest = max(1, int(cut * (1 - fraction)))
    at = text.rfind("\n", 0, cut) + 1
    if at < earliest:
        at = next((i for i in range(cut, earliest, -1) if text[i - 1].isspace()), cut)
    train, held = Document(f"{doc.name}#train", text[:at]), Document(f"{doc.name}#heldout", text[at:])
    return [train] if train.text.strip() else [], [held] if held.text.strip() else []


def _hash(train: Sequence[Document], heldout: Sequence[Document]) -> str:
    total = hashlib.sha256()
    for split, documents in ((b"train", train), (b"heldout", heldout)):
        for doc in documents:
            for part in (split, doc.name.encode(), doc.text.encode()):
                total.update(hashlib.sha256(part).digest())  # hashed first, so that no part runs into the next
    return total.hexdigest()


def _n_bytes(documents: Sequence[Document]) -> int:
    return sum(len(doc.text.encode()) for doc in documents)
