"""How a record of figures is written."""

import json
from pathlib import Path
from typing import Any


def write_record(path: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all. ValueError for a NaN, which is no JSON."""
    part = path.with_name(path.name + ".partial")
    part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    part.rename(path)
