"""Training states on disk: written whole or not at all, verified before use.

`step-N/` holds `model/` (an ordinary checkpoint with tokenizer), `optimizer.pt`, and `manifest.json` with the size and
SHA-256 of every file. It is written under another name, synced, and renamed last, so an interrupted save leaves the
previous states as they were.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(
    root: Path,
    step: int,
    save_model: Callable[[Path], None],
    optimizer_state: dict[str, Any],
    record: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-N` and drop all but the newest `keep` states.

    `save_model` writes the model into the folder it is given; `record` is JSON-serialisable and returned on loading.
    Raises `OSError` naming the path when it cannot be written; earlier states are then untouched.
    """
    final = root / f"step-{step}"
    temporary = root / f".step-{step}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_model(temporary / "model")
        torch.save(optimizer_state, temporary / "optimizer.pt")
        sizes = {str(f.relative_to(temporary)): [f.stat().st_size, _sha256(f)] for f in _files(temporary)}
        manifest = {"step": step, "files": sizes, "record": record}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (*_files(temporary), temporary / MANIFEST, temporary):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(root).free
        raise OSError(
            f"{final}: not saved ({error}); {free / 1e6:.0f} MB are free; earlier states are kept"
        ) from error
    for old in list_states(root)[keep:]:
        shutil.rmtree(old)
    return final


def list_states(root: Path) -> list[Path]:
    """Finished states, newest first."""
    states = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(states, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def verify_state(state: Path) -> dict[str, Any]:
    """The state's manifest, after every file was compared with it. Raises `ValueError` naming the first bad file."""
    try:
        manifest = json.loads((state / MANIFEST).read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{state / MANIFEST}: cannot be read ({type(error).__name__}: {error})") from None
    for name, (size, digest) in files:
        file = state / name
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} of {size} bytes")
        if _sha256(file) != digest:
            raise ValueError(f"{file}: its contents changed since it was saved (SHA-256 differs)")
    return manifest


def newest_state(root: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that verifies, with its manifest; None if there is no state at all.

    Each rejected state is reported. Raises `ValueError` if states exist and none verifies: a run never silently
    starts afresh.
    """
    reasons = []
    for state in list_states(root):
        try:
            return state, verify_state(state)
        except ValueError as error:
            reasons.append(str(error))
            report(f"not usable: {error}")
    if reasons:
        raise ValueError(f"{root}: no usable state: {'; '.join(reasons)}. Remove {root} to start again.")
    return None


def load_optimizer_state(state: Path) -> dict[str, Any]:
    """The optimizer's state dict; tensors and plain values only, nothing is unpickled."""
    return torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
