"""Saved states under injected faults: a state that loads is whole, and a fault never costs the states before it."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3 import durable
from deepseek_v3.training import checkpoint
from deepseek_v3.training.checkpoint import (
    list_states,
    load_optimizer_state,
    newest_state,
    save_state,
    set_aside,
    verify_state,
)

FILES = ("manifest.json", "optimizer.pt", "model/config.json", "model/model.safetensors")


def save_model(folder: Path, value: float = 0.0, size: int = 256) -> None:
    folder.mkdir()
    save_file({"weight": torch.full((size,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"value": value}))


def save(root: Path, step: int, keep: int = 3, size: int = 256) -> Path:
    optimizer = {"masters": [torch.full((64,), float(step))], "adamw": {"state": {}}}
    record = {"corpus_sha256": "abc", "step_again": step}
    return save_state(root, step, lambda folder: save_model(folder, float(step), size), optimizer, record, keep)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    reports: list[str] = []
    found = newest_state(root, reports.append)
    return (None if found is None else found[0]), reports


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "checkpoints"
    assert newest(root) == (None, [])
    assert save(root, 9) == root / "step-9"
    save(root, 10)
    found = newest_state(root, pytest.fail)
    assert found is not None
    state, manifest = found
    assert state == root / "step-10"
    assert manifest["step"] == 10 and manifest["record"] == {"corpus_sha256": "abc", "step_again": 10}
    assert {*manifest["files"]} == {*FILES} - {"manifest.json"}
    assert torch.equal(load_optimizer_state(state)["masters"][0], torch.full((64,), 10.0))
    assert torch.equal(load_file(state / "model" / "model.safetensors")["weight"], torch.full((256,), 10.0))
    assert names(root) == ["step-10", "step-9"]  # nothing temporary stays


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "half", "bit", "folder"])
def test_a_damaged_file_is_named_and_the_state_before_is_used(tmp_path: Path, name: str, fault: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "step-20" / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if fault == "bit":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    elif fault == "folder":
        path.mkdir()
    elif fault != "missing":
        path.write_bytes(b"" if fault == "empty" else content[:middle])
    found, reports = newest(tmp_path)
    assert found == tmp_path / "step-10"
    assert len(reports) == 1 and "step-20" in reports[0]
    if name != "manifest.json":
        assert str(path) in reports[0]
        size = len(content)
        word = {"missing": "missing", "folder": "missing", "bit": "SHA-256", "empty": f"0 of {size} bytes"}
        assert word.get(fault, f"{middle} of {size} bytes") in reports[0]
    verify_state(found)


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    """Whatever a flipped bit makes of it, the state is refused or what is used of it (step, record) is unchanged.

    The error must be the one that `newest_state` goes on from.
    """
    state = save(tmp_path, 16)
    good = verify_state(state)
    content = (state / "manifest.json").read_bytes()
    generator = random.Random(0)
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.randrange(7)
        (state / "manifest.json").write_bytes(damaged)
        try:
            found = verify_state(state)
        except ValueError as error:
            refused += 1
            assert str(state) in str(error)
        else:
            assert (found["step"], found["record"]) == (good["step"], good["record"]), damaged
    assert refused > 0.7 * len(content)


@pytest.mark.parametrize(
    "manifest",
    ["[]", "3", "{}", '{"files": []}', '{"step": 16, "files": {"a": 3}, "record": {}}', '{"step": 16, "files": {}}'],
)
def test_a_strange_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    state = save(tmp_path, 16)
    (state / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="step-16"):
        verify_state(state)


def test_all_states_bad_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "step-20" / "optimizer.pt").unlink()
    (tmp_path / "step-10" / "manifest.json").unlink()
    reports: list[str] = []
    with pytest.raises(ValueError) as caught:
        newest_state(tmp_path, reports.append)
    assert len(reports) == 2
    for part in (str(tmp_path), "step-20/optimizer.pt", "step-10/manifest.json", "no usable state"):
        assert part in str(caught.value)
    assert names(tmp_path) == ["step-10", "step-20"]  # nothing is removed


def test_leftovers_are_ignored_then_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 10)
    leftover = tmp_path / ".step-20.tmp-999999"  # what a killed process leaves
    shutil.copytree(tmp_path / "step-10", leftover)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "other").mkdir()
    assert newest(tmp_path) == (tmp_path / "step-10", [])
    save(tmp_path, 30)
    assert names(tmp_path) == ["other", "step-10", "step-30", "step-x"]


def test_pruning_keeps_the_newest_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert [state.name for state in list_states(tmp_path)] == ["step-100", "step-10"]

    removed: list[str] = []
    rmtree = shutil.rmtree

    def watch(path: Path, **kwargs: bool) -> None:
        if Path(path).exists():
            removed.append(Path(path).name)
            verify_state(tmp_path / "step-200")
        rmtree(path, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watch)
    save(tmp_path, 200, keep=1)
    assert removed == ["step-100", "step-10"]
    monkeypatch.undo()

    monkeypatch.setattr(checkpoint.torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="step-300"):
        save(tmp_path, 300, keep=1)
    assert names(tmp_path) == ["step-200"]


def test_a_refused_newer_state_does_not_push_out_good_ones(tmp_path: Path) -> None:
    """After a fall back from step 20 to 10 the run saves step 15: that one must stay, with one state to keep too."""
    for step in (10, 20):
        save(tmp_path, step)
    for known, again in ((10, 15), (15, 16)):
        (tmp_path / "step-20" / "optimizer.pt").write_bytes(b"")
        assert newest(tmp_path)[0] == tmp_path / f"step-{known}"
        set_aside(tmp_path, tmp_path / f"step-{known}")
        save(tmp_path, again, keep=1)
        assert newest(tmp_path) == (tmp_path / f"step-{again}", [])
        save(tmp_path, 20, keep=2)
        assert newest(tmp_path) == (tmp_path / "step-20", [])
        assert names(tmp_path) == [".step-20.refused", f"step-{again}", "step-20"]


def test_a_refused_state_is_none_of_those_to_keep(tmp_path: Path) -> None:
    """Not even once the run has passed its step."""
    for step in (200, 250):
        save(tmp_path, step)
    (tmp_path / "step-250" / "optimizer.pt").write_bytes(b"")
    state, _ = newest(tmp_path)
    assert state == tmp_path / "step-200"
    set_aside(tmp_path, state)
    for step in (230, 300):
        save(tmp_path, step, keep=2)
    assert [state.name for state in list_states(tmp_path)] == ["step-300", "step-230"]
    assert (tmp_path / ".step-250.refused" / "model").is_dir()


class Fault:
    """Raises `error` at the `at`-th call; counts the calls, so that no test passes without its fault."""

    def __init__(self, original: Callable, at: int, error: Exception) -> None:
        self.original, self.at, self.error, self.calls = original, at, error, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.original(*args)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("at", range(1, 8))
def test_a_failing_sync_is_named_and_earlier_states_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int
) -> None:
    save(tmp_path, 10)
    fault = Fault(os.fsync, at, OSError(number, os.strerror(number)))
    monkeypatch.setattr(os, "fsync", fault)
    with pytest.raises(OSError) as caught:
        save(tmp_path, 20, keep=1)
    monkeypatch.undo()
    assert fault.calls >= at
    for part in (str(tmp_path / "step-20"), os.strerror(number), "MB are free"):
        assert part in str(caught.value)
    assert "step-10" in names(tmp_path) and not [n for n in names(tmp_path) if n.startswith(".")]
    assert newest(tmp_path)[0] in (
        tmp_path / "step-10",
        tmp_path / "step-20",
    )  # the latter if only the root's sync failed
    assert save(tmp_path, 20, keep=1).exists() and names(tmp_path) == ["step-20"]


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their folders (a file's name is in its folder), then the rename, then the folder of the states."""
    events: list[str] = []
    sync, rename = durable.sync, Path.rename

    def log_sync(path: Path) -> None:
        events.append("." if path == tmp_path else str(path.relative_to(tmp_path)).partition("/")[2] or "state")
        sync(path)

    def log_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(durable, "sync", log_sync)
    monkeypatch.setattr(Path, "rename", log_rename)
    save(tmp_path, 1)
    at = events.index("rename")
    assert sorted(events[:at]) == sorted([*FILES, "model", "state"])
    assert events[at + 1 :] == ["."]


def limited_save(root: Path, limit: int) -> None:
    """In a fork: no file may grow beyond `limit` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save(root, 20, keep=1, size=100_000)
        text = "saved"
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (root.parent / "outcome.txt").write_text(text)


def forked(function: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return child


# the model's weights (400 kB) do not fit; then the optimizer (about 2 kB) does not; then the manifest
@pytest.mark.parametrize("limit", [100_000, 1000, 100])
def test_a_full_disk_is_named_and_earlier_states_stay(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 10)
    if limit < 100_000:  # so that the first file to fail is another one
        monkeypatch.setattr(f"{__name__}.save_model", lambda folder, *_: folder.mkdir())
    if limit == 100:
        monkeypatch.setattr(checkpoint.torch, "save", lambda _, path: path.write_bytes(b""))
    os.waitpid(forked(lambda: limited_save(root, limit)), 0)
    outcome = (tmp_path / "outcome.txt").read_text()
    assert outcome.startswith("OSError: ") and str(root / "step-20") in outcome and "MB are free" in outcome
    assert names(root) == ["step-10"] and newest(root)[0] == root / "step-10"


def test_a_disk_without_room_for_the_first_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match=r"step-1: not saved .*No space left .* MB are free"):
        save(tmp_path / "checkpoints", 1)


def test_other_failures_of_a_save_leave_nothing_behind(tmp_path: Path) -> None:
    """safetensors and torch.save report a full disk as errors of their own."""

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    save(tmp_path, 10)
    with pytest.raises(OSError, match=r"step-20: not saved .*PytorchStreamWriter"):
        save_state(tmp_path, 20, fail, {}, {}, 1)
    assert names(tmp_path) == ["step-10"]


def test_sigkill_during_a_save_never_leaves_a_bad_state(tmp_path: Path) -> None:
    """15 saves, killed at points spread over their duration; whatever is there afterwards verifies."""
    root, size = tmp_path / "checkpoints", 1_000_000  # 4 MB: the save must take longer than the kill's jitter
    began = time.monotonic()
    save(root, 1, keep=1, size=size)
    duration = time.monotonic() - began
    generator = random.Random(0)
    finished, partial = 0, 0
    for trial in range(2, 17):
        before = newest(root)[0]
        child = forked(lambda step=trial: save(root, step, keep=1, size=size))
        time.sleep(duration * (trial - 2 + generator.random()) / 15)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found, reports = newest(root)
        assert found is not None
        # an old state may be half pruned, but it is never the one that is used
        assert found in (before, root / f"step-{trial}") and (not reports or found.name == f"step-{trial}")
        verify_state(found)
        value = torch.tensor(float(found.name.removeprefix("step-")))
        assert (load_file(found / "model" / "model.safetensors")["weight"] == value).all()
        finished += found != before
        partial += any(name.startswith(".step") for name in names(root))
    assert partial >= 3, (finished, partial)  # else nothing was killed in the middle
    save(root, 99, keep=1)
    assert names(root) == ["step-99"]


def test_optimizer_states_are_never_unpickled(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "step-1").mkdir()
    torch.save({"adamw": Harmful()}, tmp_path / "step-1" / "optimizer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_optimizer_state(tmp_path / "step-1")
    assert not (tmp_path / "ran").exists()
