"""The launch configuration of each kernel, from checked-in tables: one per device family, kernel and shape bucket.

A table is `<name>.json`: kernel -> list of entries, the first that applies is used. An entry's `"max"` bounds sizes
(inclusive); everything else in it is passed to the kernel (`BLOCK_M`, `num_warps`, `num_stages` ...). Looked up in
order: the device's own name (`nvidia_h100_80gb_hbm3.json`), its compute capability (`sm_90.json`), `default.json`.
Nothing is tuned at run time or on import: `python benchmarks/kernels.py --tune` measures and writes a table.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
_forced: dict[str, dict[str, Any]] = {}


@cache
def read_table(name: str) -> dict[str, list[dict[str, Any]]]:
    """The table `<name>.json`, empty if there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table_name(device: torch.device) -> str:
    """The name of a CUDA device's own table: `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower()


@cache
def _table_names(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("default",)
    major, minor = torch.cuda.get_device_capability(device)
    return table_name(device), f"sm_{major}{minor}", "default"


@cache
def _lookup(device: torch.device, kernel: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    found = dict(sizes)
    for name in _table_names(device):
        for entry in read_table(name).get(kernel, []):
            if all(found[size] <= bound for size, bound in entry.get("max", {}).items()):
                return {key: value for key, value in entry.items() if key != "max"}
    raise AssertionError(f"configs/default.json has no entry for {kernel} with {found}")


def bucket(size: int) -> int:
    """The power of two at or above `size`: what a size that changes with every batch is looked up by."""
    return 1 << max(0, size - 1).bit_length()


def kernel_config(kernel: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """The configuration of `kernel` on `device` for these sizes (pass varying ones through `bucket`)."""
    if kernel in _forced:
        return _forced[kernel]
    return _lookup(device, kernel, tuple(sizes.items()))


@contextmanager
def forced_config(kernel: str, entry: dict[str, Any]) -> Iterator[None]:
    """Use `entry` whatever the table says: for tuning and for the compile check."""
    _forced[kernel] = {key: value for key, value in entry.items() if key != "max"}
    try:
        yield
    finally:
        del _forced[kernel]


@cache
def num_programs(device: torch.device) -> int:
    """How many programs a persistent kernel starts per wave: the multiprocessors; 4 off a GPU (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
