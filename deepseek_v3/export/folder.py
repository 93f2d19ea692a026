"""The folder that an export writes to: whose it is, what lies in it beside the weights, and the report."""

import errno
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..durable import file_sha256
from ..modeling_deepseek_v3.weight_files import read_json
from .files import PlannedFile
from .source import Source
from .steps import ROUTING_BIAS, Step

PLAN, REPORT, LOCK = ".export.json", "export.json", ".lock"
RESERVE = 2**24  # bytes for the files beside the weights


def check_folder(folder: Path, plan: dict[str, Any], companions: Collection[str]) -> dict[str, Any] | None:
    """Check that `folder` is free for the export `plan`, or its own. Returns the report if it is done already.

    Args:
        companions: names of the files that go along with the weights. A finished export may lack some of them.

    Raises:
        ValueError: the folder holds something else, or another export, or one that is finished and damaged.
    """
    present = {path.name for path in folder.iterdir()} - {LOCK, f"{PLAN}.partial"}
    for name in sorted({REPORT, PLAN} & present, reverse=True):  # the report is written last
        content = read_json(folder / name)
        if not isinstance(content, dict):
            raise ValueError(f"{folder / name}: found {type(content).__name__}, allowed is an object")
        found = content.get("plan", content)
        if differing := [key for key in plan if found.get(key) != plan[key]]:
            problem = f"holds another export, with another {', '.join(differing)}"
            raise ValueError(f"{folder / name}: {problem}; allowed is a folder that is new, empty, or of this export")
        if name == REPORT:
            _check_whole(folder, content, companions)
            return content
        return None
    if present:
        found = ", ".join(sorted(present)[:4])
        raise ValueError(f"{folder}: found {found}, allowed is a folder that is new or empty")
    return None


def _check_whole(folder: Path, report: dict[str, Any], companions: Collection[str]) -> None:
    for name, file in report["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if name not in companions and size != file["bytes"]:
            found = "not there" if size is None else f"found {size} bytes"
            problem = f"{found}, the finished export has {file['bytes']}"
            raise ValueError(f"{path}: {problem}; delete {folder} or name another folder")
        if name in companions and size is not None and file_sha256(path) != file["sha256"]:
            problem = "differs from that of the finished export; delete it, and the same command writes it again"
            raise ValueError(f"{path}: {problem}")


def check_room(folder: Path, files: Sequence[PlannedFile]) -> None:
    """Whether the disk has room for what is missing; `ValueError` says how much."""
    missing = RESERVE
    for file in files:
        there = [path for path in (folder / file.name, folder / f"{file.name}.partial") if path.exists()]
        missing += file.n_bytes - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise ValueError(f"{folder}: found {free:,} bytes free, the export needs {missing:,} more")


@contextmanager
def room_errors(folder: Path) -> Iterator[None]:
    """Say what to do if the disk fills up all the same."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{folder}: no room left on the disk; make some, and run the same command again") from None


def write_config(source: Source, folder: Path, dtype: torch.dtype, quantization: dict[str, Any] | None) -> None:
    """`config.json`, complete for every reader."""
    config = type(source.config).from_dict(source.config.to_dict())
    config.dtype = dtype
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)


def copy_companions(files: Mapping[str, Path], folder: Path) -> None:
    """Copy `Source.companions` to `folder`."""
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


def restore_companions(files: Mapping[str, Path], folder: Path, report: dict[str, Any]) -> None:
    """Copy those of `Source.companions` again that a finished export has lost.

    Raises:
        ValueError: one in the source is not the one that the report describes.
    """
    missing = {name: file for name, file in files.items() if name in report["files"] and not (folder / name).exists()}
    for name, file in missing.items():
        if file_sha256(file) != report["files"][name]["sha256"]:
            raise ValueError(f"{file}: differs from that of the finished export in {folder}; allowed is the same file")
    copy_companions(missing, folder)


def figures(source: Source, steps: Sequence[Step]) -> dict[str, Any]:
    """Counts for the report, of what is written: a step without outputs drops its inputs."""

    def elements(names: Sequence[str]) -> int:
        return sum(prod(source.shape(name)) for name in names if not name.endswith(ROUTING_BIAS))

    dropped = [name for step in steps if not step.outputs for name in step.inputs]
    steps = [step for step in steps if step.outputs]
    quantized = [step for step in steps if step.quantized]
    in_quantized = elements([name for step in quantized for name in step.inputs])
    parameters = elements([name for step in steps for name in step.inputs])
    return {
        "parameters": parameters,
        "quantized": {
            "parameters": in_quantized,
            "share": in_quantized / parameters,
            "bytes": sum(output.n_bytes for step in quantized for output in step.outputs),
            "bytes_in_bf16": 2 * in_quantized,
        },
        "tensors": {
            "read": sum(len(step.inputs) for step in steps),
            "quantized": sum(len(step.inputs) for step in quantized),
            "written": sum(len(step.outputs) for step in steps),
            "dropped": len(source.dropped) + len(dropped),
        },
    }
