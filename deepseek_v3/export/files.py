"""Files that are planned before they are written, and written so that the same export goes on after an interruption.

A file is written from front to back as `NAME.partial`. After each step one line of a journal says how far it is and
what the SHA-256 of all bytes up to there is. Going on means hashing the partial file and cutting it after the last
step that the journal confirms, so a file that was cut short or damaged is written again from the damage on.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..durable import sync, write_json, write_text
from ..modeling_deepseek_v3.weight_files import INDEX_NAME, WEIGHTS_NAME
from .steps import Output, Step
from .stored import DTYPES, bytes_of

JOURNAL = ".export.journal"
CHUNK = 2**24  # bytes hashed and written at a time


@dataclass(frozen=True)
class PlannedFile:
    """A file of which every byte's place is known.

    Attributes:
        name: of the finished file.
        head: its first bytes.
        steps: those that fill it, in order.
        offsets: position in the file of each output of these steps, ascending; zeros fill the gaps.
        n_bytes: size of the whole file.
    """

    name: str
    head: bytes
    steps: tuple[Step, ...]
    offsets: tuple[int, ...]
    n_bytes: int


def plan_file(name: str, head: bytes, steps: Sequence[Step], alignment: int = 1) -> PlannedFile:
    """Lay out the outputs of `steps` after `head`, each (and the end of the file) at a multiple of `alignment`."""
    offsets, position = [], aligned(len(head), alignment)
    for output in (output for step in steps for output in step.outputs):
        offsets.append(position)
        position = aligned(position + output.n_bytes, alignment)
    return PlannedFile(name, head, tuple(steps), tuple(offsets), position)


def aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def plan_safetensors(steps: Sequence[Step], max_shard_bytes: int) -> list[PlannedFile]:
    """One file, or shards with official names of at most `max_shard_bytes` of data, unless one step has more."""
    shards: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        step_bytes = sum(output.n_bytes for output in step.outputs)
        if size and size + step_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += step_bytes
    stem, suffix = WEIGHTS_NAME.split(".")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.{suffix}" for i in range(1, len(shards) + 1)]
    return [
        plan_file(name, safetensors_head([output for step in shard for output in step.outputs]), shard)
        for name, shard in zip(names if len(shards) > 1 else [WEIGHTS_NAME], shards, strict=True)
    ]


def safetensors_head(outputs: Iterable[Output]) -> bytes:
    """The first bytes of a safetensors file with these tensors, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in outputs:
        end = position + output.n_bytes
        header[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, files: Sequence[PlannedFile], parameters: int) -> None:
    """`model.safetensors.index.json`, if there is more than one file."""
    if len(files) == 1:
        return
    outputs = [(output, file.name) for file in files for step in file.steps for output in step.outputs]
    metadata = {"total_parameters": parameters, "total_size": sum(output.n_bytes for output, _ in outputs)}
    weight_map = {output.name: name for output, name in sorted(outputs, key=lambda pair: pair[0].name)}
    write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


class Journal:
    """How far each file is: lines of JSON, `{file, step, end, sha256, seconds}`; a torn last line does not count."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.lines: list[dict[str, Any]] = []
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                break
            kept += len(line)
        if self.path.exists():
            os.truncate(self.path, kept)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["file"] == name]

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def keep(self, name: str, steps: int) -> None:
        """Forget what it says of the steps of a file after the first `steps`."""
        kept = [line for line in self.lines if line["file"] != name or line["step"] <= steps]
        if len(kept) < len(self.lines):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.lines = kept

    @property
    def seconds(self) -> float:
        """That the runs so far took."""
        return self.lines[-1]["seconds"] if self.lines else 0.0


class PartialFile:
    """A planned file while it is written; a context manager.

    Attributes:
        done: steps that are whole. After opening, those that an earlier run wrote and that are undamaged.
        position: bytes that are written.
        sha256: of these bytes.
    """

    def __init__(self, folder: Path, plan: PlannedFile, journal: Journal) -> None:
        self.plan, self.journal = plan, journal
        self.path, self.partial = folder / plan.name, folder / f"{plan.name}.partial"
        self.done, self.position, self._hash = 0, 0, hashlib.sha256()

    def __enter__(self) -> "PartialFile":
        """Confirm what is there, and cut off the rest. A whole file that is damaged becomes a partial one again."""
        existing = self.path if self.path.exists() else self.partial
        if existing.exists():
            self._confirm(existing)
        as_planned = self.done == len(self.plan.steps) and existing.stat().st_size == self.plan.n_bytes
        self._output = sum(len(step.outputs) for step in self.plan.steps[: self.done])
        self.journal.keep(self.plan.name, self.done)
        if existing == self.path and not as_planned:
            self.path.rename(self.partial)
        self.whole = self.path.exists()
        if not self.whole:
            self._file = self.partial.open("r+b" if self.partial.exists() else "w+b", buffering=0)
            self._file.truncate(self.position)
            self._file.seek(self.position)
            if not self.position:
                self._write(memoryview(self.plan.head))
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.whole:
            self._file.close()

    def _confirm(self, file: Path) -> None:
        running, position = hashlib.sha256(self.plan.head), len(self.plan.head)
        with file.open("rb") as stream:
            if stream.read(position) != self.plan.head:
                return
            for line in self.journal.of(self.plan.name):
                while position < line["end"] and (chunk := stream.read(min(CHUNK, line["end"] - position))):
                    running.update(chunk)
                    position += len(chunk)
                if position != line["end"] or running.hexdigest() != line["sha256"]:
                    return
                self.done, self.position, self._hash = line["step"], position, running.copy()

    def write_step(self, tensors: Iterable[torch.Tensor], seconds: float) -> None:
        """Write the outputs of the next step.

        Raises:
            ValueError: the tensors are not those that were planned.
            OSError: they cannot be written; what is whole stays.
        """
        step = self.plan.steps[self.done]
        expected = iter(step.outputs)
        for tensor in tensors:
            output = next(expected, None)
            found = f"{tensor.dtype} {list(tensor.shape)}"
            if output is None:
                raise ValueError(f"{self.plan.name}: step of {step.inputs}: found a tensor more, {found}")
            if tensor.dtype != DTYPES[output.dtype] or tuple(tensor.shape) != output.shape:
                raise ValueError(f"{output.name}: found {found}, planned is {output.dtype} {list(output.shape)}")
            self._pad(self.plan.offsets[self._output])
            self._write(bytes_of(tensor))
            self._output += 1
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{missing.name}: planned, but its step ended before it")
        self.done += 1
        if self.done == len(self.plan.steps):
            self._pad(self.plan.n_bytes)
        entry = {"file": self.plan.name, "step": self.done, "end": self.position, "sha256": self.sha256}
        self.journal.add(**entry, seconds=round(seconds, 1))

    def _pad(self, position: int) -> None:
        self._write(memoryview(bytes(position - self.position)))

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._hash.update(chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]
        self.position += len(data)

    def finish(self) -> None:
        """Make the whole file durable and give it its name."""
        if self.whole:
            return
        os.fsync(self._file.fileno())
        self.partial.rename(self.path)
        sync(self.path.parent)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
