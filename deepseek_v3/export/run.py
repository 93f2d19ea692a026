"""`export`: from a checkpoint to a folder in another format, one step in memory at a time."""

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..configuration.licence import licence_files
from ..configuration.local_paths import without_paths
from ..durable import file_sha256, write_json
from ..process import environment, locked, peak_memory, reset_peak_memory, say, stop_signals
from .files import Journal, PartialFile, PlannedFile, plan_safetensors, write_index
from .folder import (
    LOCK,
    PLAN,
    REPORT,
    check_folder,
    check_room,
    copy_companions,
    figures,
    restore_companions,
    room_errors,
    write_config,
)
from .options import FormatOptions, check_option
from .source import Source
from .steps import Step

# name -> module of this package
FORMATS = {
    "bf16": "bf16",
    "fp8": "fp8",
    "int4": "int4",
    "int8": "int8",
    "nf4": "nf4",
    "bnb-int8": "bnb_int8",
    "gguf": "gguf",
}
WEIGHTS = (".safetensors", ".gguf")
SECONDS_PER_LINE = 10  # of progress, if there is no terminal


def export(
    source: Source | str | PathLike[str],
    output: str | PathLike[str],
    format: str,
    *,
    adapter: str | PathLike[str] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Write a checkpoint in another format, and what was done to `export.json`. Resumes what it was interrupted in.

    A format is a module of this package with `Options` (of `FormatOptions`), `steps(source, options)` and
    `quantization_config(source, options)`; it may have
    `config_dtype(options)`, the dtype that config.json names (default bf16);
    `files(source, steps, options)`, for files that are not safetensors: these stand alone, without config.json and
    tokenizer;
    `finish(folder, source, options)`, called when the planned files are whole, to write further files or replace
    these; `calibration(source, options)`, called before the steps are made: what the report says under that name.

    Args:
        source: a folder, see `Source`.
        output: a folder that does not exist, is empty, or holds this export, interrupted or done.
        format: a name in `FORMATS`.
        adapter: a PEFT adapter to merge, see `Source`.
        max_shard_bytes: data in one file, unless a step alone has more.
        progress: show it: a bar on a terminal, else a line every ten seconds.
        options: those of the format, the fields of its `Options`.

    Returns:
        What `export.json` holds. `bytes` are those of the weights' files, `parameters` the elements of the official
        tensors in them without the routing biases. Of local paths among the options it holds the names.

    Raises:
        ValueError: an unknown format or option, a source that cannot be read, an output folder with something else in
            it, a disk without room; says what was found and what is allowed.
        InterruptedError: stopped by a signal after a step; the same call goes on from there.
    """
    settings = format_options(format, options)
    check_option("max_shard_bytes", max_shard_bytes, int)
    check_option("progress", progress, bool)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: found {max_shard_bytes}, allowed are sizes above 0")
    module = _module(format)
    if not isinstance(source, Source):
        source = Source(source, adapter)
    elif adapter is not None:
        raise ValueError("adapter: found one with a Source, allowed is Source(folder, adapter)")
    for note in source.notes:
        say(note)
    folder = Path(output)
    if folder.exists() and folder.resolve() == source.folder.resolve():
        raise ValueError(f"output: found {str(folder)!r}, which is the source; allowed is another folder")

    calibration = module.calibration(source, settings) if hasattr(module, "calibration") else None
    plan = {
        "package": __version__,
        "format": format,
        "options": without_paths(asdict(settings)),
        "calibration": None if calibration is None else without_paths(calibration),
        "max_shard_bytes": max_shard_bytes,
        "source": source.fingerprint(),
    }
    steps = module.steps(source, settings)
    check_steps(source, steps, official=not hasattr(module, "files"))
    files = module.files(source, steps, settings) if hasattr(module, "files") else None
    files = plan_safetensors(steps, max_shard_bytes) if files is None else files

    companions = source.companions()
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder, plan, companions)  # the lock is a file: none is written into somebody else's folder
    with locked(folder):
        report = check_folder(folder, plan, companions)
        if report is not None:
            restore_companions(companions, folder, report)
        else:
            with room_errors(folder):
                report = _write(source, folder, files, module, settings, plan, progress)
        for path in (*folder.glob(".export*"), folder / LOCK):
            path.unlink()
    return report


def format_options(format: str, given: Mapping[str, Any]) -> FormatOptions:
    """The `Options` of a format, with the fields that are `given`.

    Raises:
        ValueError: an unknown format or one whose library is missing, a name that is no option of it, or a value that
            is not allowed; says what was found and what is allowed.
    """
    module = _module(format)
    allowed = [field.name for field in fields(module.Options)]
    if unknown := [name for name in given if name not in allowed]:
        raise ValueError(f"options: found {', '.join(unknown)}, allowed are {', '.join(allowed)}")
    return module.Options(**given)


def _module(format: str) -> ModuleType:
    if format not in FORMATS:
        raise ValueError(f"format: found {format!r}, allowed are {', '.join(FORMATS)}")
    try:
        return importlib.import_module(f".{FORMATS[format]}", __package__)
    except ModuleNotFoundError as error:
        needs = f"needs a library that is not installed: pip install {error.name}"
        raise ValueError(f"format: {format} {needs}") from error


def check_steps(source: Source, steps: Sequence[Step], official: bool) -> None:
    """Every tensor of `source` is consumed by one step, and no name is written twice.

    `official`: what is not quantized keeps its name and shape, and what is quantized is written under names that
    begin with the official one, or replace its `weight`. The copies in the MTP layers are complete.

    Raises:
        ValueError: names the tensors.
    """
    official_names = set(source.names)
    consumed = Counter(name for step in steps for name in step.inputs)
    problems = {
        "not consumed": [name for name in source.names if not consumed[name]],
        "consumed twice": [name for name, count in consumed.items() if count > 1],
        "not in the source": [name for name in consumed if name not in official_names],
    }
    written = Counter(output.name for step in steps for output in step.outputs)
    problems["written twice"] = [name for name, count in written.items() if count > 1]
    if official:
        problems["copies not written"] = [name for name in source.copies if name not in written]
        for step in steps:
            problems.setdefault("not official", []).extend(_unofficial(source, step))
    if found := {problem: names for problem, names in problems.items() if names}:
        texts = [f"{len(names)} tensors {problem}: {', '.join(names[:4])}" for problem, names in found.items()]
        raise ValueError(f"the format's steps do not fit the source: {'; '.join(texts)}")


def _unofficial(source: Source, step: Step) -> Iterator[str]:
    """Names that a step writes or leaves out against the rules of `check_steps`."""
    modules = tuple(name.rpartition(".")[0] + "." for name in step.inputs)
    outputs = {output.name: output for output in step.outputs}
    for name, output in outputs.items():
        original = source.copies.get(name, name)
        plain = original in step.inputs and output.shape == source.shape(original)
        if not (plain or (step.quantized and name.startswith(modules))):
            yield name
    for name, module in zip(step.inputs, modules, strict=True):
        if not any(output.startswith(module) if step.quantized else output == name for output in outputs):
            yield name


def _write(
    source: Source,
    folder: Path,
    files: Sequence[PlannedFile],
    module: ModuleType,
    options: Any,
    plan: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    began = time.monotonic()
    reset_peak_memory()
    journal = Journal(folder)
    earlier = journal.seconds
    check_room(folder, files)
    source.check_copies()
    write_json(folder / PLAN, plan)
    hashes: dict[str, str] = {}
    total = sum(file.n_bytes for file in files)
    with _progress(total, progress) as advance, stop_signals() as stop, torch.no_grad():
        for planned in files:
            with PartialFile(folder, planned, journal) as file:
                advance(file.position)
                for step in planned.steps[file.done :]:
                    before = file.position
                    read = source.read_finite if step.quantized else source.read
                    file.write_step(step.run(read), earlier + time.monotonic() - began)
                    advance(file.position - before)
                    if stop:
                        raise InterruptedError(f"{folder}: stopped in {planned.name} after step {file.done}, saved")
                file.finish()
                hashes[planned.name] = file.sha256

    counts = figures(source, [step for file in files for step in file.steps])
    if not hasattr(module, "files"):
        dtype = module.config_dtype(options) if hasattr(module, "config_dtype") else torch.bfloat16
        write_index(folder, files, counts["parameters"])
        write_config(source, folder, dtype, module.quantization_config(source, options))
        copy_companions(source.companions(), folder)
    else:  # one file holds the rest
        copy_companions(licence_files(source.folder), folder)
    if hasattr(module, "finish"):
        module.finish(folder, source, options)
        hashes = {}
    report = {
        "plan": plan,
        "format": plan["format"],
        "options": plan["options"],
        "source": source.record(),
        **counts,
        "calibration": plan["calibration"],
        "environment": environment("cpu"),
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": hashes.get(name) or file_sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not (name := path.relative_to(folder).as_posix()).startswith(".") and name != REPORT
        },
    }
    weights = [file["bytes"] for name, file in report["files"].items() if name.endswith(WEIGHTS)]
    report["bytes"] = sum(weights)
    report["bytes_per_parameter"] = report["bytes"] / report["parameters"]
    report["seconds"] = round(earlier + time.monotonic() - began, 1)
    report["peak_memory_bytes"] = peak_memory()
    write_json(folder / REPORT, report)
    return report


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told of every byte: a bar on a terminal, else a line now and then."""
    if shown and sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="export") as bar:

            def show(count: int) -> None:
                bar.update(count)

            yield show
        return
    done, said = 0, time.monotonic()

    def count_up(count: int) -> None:
        nonlocal done, said
        done += count
        if shown and time.monotonic() - said >= SECONDS_PER_LINE:
            said = time.monotonic()
            say(f"export: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")

    yield count_up
