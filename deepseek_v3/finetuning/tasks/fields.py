"""What the tasks read with: files of installed packages or given paths, and columns of a row, each checked."""

from collections.abc import Collection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ...data import Row
from ...data.sources import check_unicode


def given_path(task: str, path: str | None) -> Path:
    """The folder or file of a task that has no data of its own.

    Raises:
        ValueError: not given, or not there.
    """
    if path is None:
        raise ValueError(f"task {task!r} comes with no data: give its folder as path")
    if not Path(path).exists():
        raise ValueError(f"task {task!r}: {path}: no such file or folder")
    return Path(path)


def package_file(task: str, package: str, pattern: str, install: str) -> tuple[Path, str]:
    """The one file of an installed package that matches `pattern`, and ``"package version"``.

    Raises:
        ValueError: the package is missing, with the command that installs it, or holds not exactly one such file.
    """
    spec = find_spec(package)  # of a top-level name: runs nothing of the package
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"task {task!r} reads the data of {package}: {install}; or give its file as path")
    root = Path(spec.submodule_search_locations[0])
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{root}: expected one file {pattern}, found {[path.name for path in found]}")
    return found[0], f"{package} {version(package)}"


def need_columns(row: Row, *columns: str) -> None:
    """Raises ValueError, with the columns found, unless the row has them all."""
    missing = [column for column in columns if column not in row.fields]
    if missing:
        raise ValueError(f"{row.where}: columns {missing} not found; found {sorted(row.fields)}")


def text_of(row: Row, column: str) -> str:
    """The text in a column, as it is.

    Raises:
        ValueError: no such column, not text, blank, or no Unicode.
    """
    need_columns(row, column)
    value = row.fields[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{row.where}: column {column!r} must hold text, found {value!r:.60}")
    check_unicode(value, f"{row.where}: column {column!r}")
    return value


def label_of(row: Row, column: str, allowed: Collection[str] | None = None) -> str:
    """The class in a column: text, or an integer or truth value as text.

    Raises:
        ValueError: no such column, another type, blank, no Unicode, or not one of `allowed`.
    """
    need_columns(row, column)
    value = row.fields[column]
    label = str(value) if isinstance(value, (str, int)) else ""
    if not label.strip() or (allowed is not None and label not in allowed):
        expected = "text or an integer" if allowed is None else f"one of {sorted(allowed)}"
        raise ValueError(f"{row.where}: column {column!r} must be {expected}, found {value!r:.60}")
    check_unicode(label, f"{row.where}: column {column!r}")
    return label
