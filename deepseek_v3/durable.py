"""Files that are whole or not there, and what identifies their content."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of everything in a folder, and of the folder."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_json(path: Path, content: Any, allow_nan: bool = True) -> None:
    """Whole or not at all. With `allow_nan=False`, ValueError for a NaN, which is no JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")


def write_text(path: Path, content: str) -> None:
    """Whole or not at all, in UTF-8."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    sync(partial)
    partial.rename(path)
