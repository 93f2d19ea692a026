"""What records and cards say of data and models: names, where a path of this machine was given.

Records lie beside the weights and are published with them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

# of recipes and records; where such a field holds an object, its keys may be paths
PATH_FIELDS = frozenset(
    "base task tasks data heldout tokenizer general_text text calibration name source bits_per_byte".split()
)
# what stands before and after the path in a source of text, and in its name
_SOURCE = re.compile(r"((?:heldout:)?(?:datasets:)?)(.*?)(, held-out split)?", re.DOTALL)


def is_repository(name: str) -> bool:
    """Whether `name` reads as a Hub repository and is nothing on this disk."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def public_name(value: str) -> str:
    """A source of data or a model with the last part of a local path instead of the path; anything else as it is.

    >>> public_name("../clients/a/q3.txt"), public_name("heldout:/data/news"), public_name("datasets:some/set:a")
    ('q3.txt', 'heldout:news', 'datasets:some/set:a')
    """
    found = _SOURCE.fullmatch(value.strip())
    assert found is not None
    prefix, path, suffix = found.groups(default="")
    if prefix.endswith("datasets:"):
        path, colon, rest = path.partition(":")
        suffix = f"{colon}{rest}{suffix}"
    if re.search(r"[/\\]", path) and "://" not in path and not is_repository(path):
        path = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return f"{prefix}{path}{suffix}"


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with `public_name` in `PATH_FIELDS`, and without `output_dir`.

    Raises:
        ValueError: two keys of an object would become one.
    """
    return {name: _public(name, value) for name, value in record.items() if name != "output_dir"}


def _public(field: str, value: Any) -> Any:
    if isinstance(value, str) and field in PATH_FIELDS:
        return " | ".join(map(public_name, value.split(" | ")))  # training and held-out text
    if isinstance(value, list):
        return [_public(field, part) for part in value]
    if not isinstance(value, Mapping):
        return value
    inner = without_paths(value)
    if field not in PATH_FIELDS:
        return inner
    named: dict[str, Any] = {}
    for key, content in inner.items():
        if (name := public_name(key)) in named:
            raise ValueError(f"{field}: found two entries called {name!r} once their folders are left out")
        named[name] = content
    return named
