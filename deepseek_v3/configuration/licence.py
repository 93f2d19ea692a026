"""The files of a model's licence. They go along with what is made of its weights; a card's `license_link` may name
one.
"""

from pathlib import Path

_STEMS, _SUFFIXES = ("LICENSE", "LICENCE", "NOTICE"), ("", ".md", ".txt")


def is_licence_file(name: str) -> bool:
    """
    >>> is_licence_file("LICENSE-MODEL"), is_licence_file("NOTICE.txt"), is_licence_file("LICENSE.pkl")
    (True, True, False)
    """
    return name.upper().startswith(_STEMS) and Path(name).suffix.lower() in _SUFFIXES


def licence_files(folder: Path) -> dict[str, Path]:
    """Name -> file of those in `folder`."""
    return {path.name: path for path in sorted(folder.iterdir()) if is_licence_file(path.name) and path.is_file()}
