"""Training states on disk: written whole or not at all, verified before use.

`step-N/` holds `model/` (an ordinary checkpoint with tokenizer), `optimizer.pt` (with all else that training resumes
from), and `manifest.json` with the size and
SHA-256 of every file and of itself. It is written under another name, synced, and renamed last, so an interrupted save
leaves the previous states as they were.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import durable

MANIFEST = "manifest.json"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _step(state: Path) -> int:
    return int(state.name.removeprefix("step-"))


def save_state(
    root: Path,
    step: int,
    save_model: Callable[[Path], None],
    optimizer_state: dict[str, Any],
    record: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-N`, then drop all but the newest `keep` states and what killed saves left behind.

    There is none of a later step: `set_aside` comes before a run goes on.
    `save_model` writes the model into the folder it is given; `record` is JSON-serialisable and returned on loading.
    Raises `OSError` naming the path when it cannot be written; earlier states are then untouched.
    """
    final = root / f"step-{step}"
    temporary = root / f".step-{step}.tmp-{os.getpid()}"
    try:
        _remove_leftovers(root)
        temporary.mkdir(parents=True)
        save_model(temporary / "model")
        torch.save(optimizer_state, temporary / "optimizer.pt")
        sizes = {str(f.relative_to(temporary)): [f.stat().st_size, durable.file_sha256(f)] for f in _files(temporary)}
        manifest = {"step": step, "files": sizes, "record": record}
        signed = json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1)
        (temporary / MANIFEST).write_text(signed, encoding="utf-8")
        durable.sync_tree(temporary)
        if final.exists():
            final.rename(root / f".step-{step}.tmp-replaced")
        temporary.rename(final)
        durable.sync(root)
    except Exception as error:  # safetensors and torch.save report a full disk as errors of their own
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
        raise OSError(
            f"{final}: not saved ({error}); {free / 1e6:.0f} MB are free; earlier states are kept"
        ) from error
    for old in list_states(root)[keep:]:
        shutil.rmtree(old)
    _remove_leftovers(root)
    return final


def _remove_leftovers(root: Path) -> None:
    for leftover in root.glob(".step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def list_states(root: Path) -> list[Path]:
    """Finished states, newest first."""
    states = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(states, key=_step, reverse=True)


def verify_state(state: Path) -> dict[str, Any]:
    """The state's manifest, after every file was compared with it. Raises `ValueError` naming the first bad file."""
    try:
        manifest = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
        own_digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{state / MANIFEST}: cannot be read ({type(error).__name__}: {error})") from None
    if own_digest != _digest(manifest):
        raise ValueError(f"{state / MANIFEST}: its contents changed since it was saved (SHA-256 differs)")
    if manifest["step"] != _step(state):
        raise ValueError(f"{state / MANIFEST}: is of step {manifest['step']}; the folder was renamed")
    for name, (size, digest) in manifest["files"].items():
        file = state / name
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} of {size} bytes")
        if durable.file_sha256(file) != digest:
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


def set_aside(root: Path, chosen: Path) -> None:
    """Rename the states newer than `chosen`, which did not verify, to `.step-N.refused`: they are states no longer."""
    for state in list_states(root):
        if _step(state) > _step(chosen):
            refused = root / f".{state.name}.refused"
            shutil.rmtree(refused, ignore_errors=True)  # of an earlier resume
            state.rename(refused)


def load_optimizer_state(state: Path) -> dict[str, Any]:
    """What `save_state` got as `optimizer_state`; tensors and plain values only, nothing is unpickled."""
    return torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
