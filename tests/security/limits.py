"""Runs one load in a forked child with limited memory and time, and says how it ended."""

import faulthandler
import gc
import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

CPU_SECONDS = 1.0  # of processor time, because the machines are shared; imports are done before the fork
WALL_SECONDS = 20.0  # ends what waits or spins
GROWTH_BYTES = 256 * 2**20  # peak resident memory beyond that of the parent
ADDRESS_BYTES = 3 * 2**30  # hard limit of the address space beyond that of the parent
OURS = ("ValueError", "OSError")


class Outcome(NamedTuple):
    """How a load ended: the error's class names from the most special on (empty if it returned), its message, cost."""

    classes: list[str]
    message: str
    seconds: float
    growth: int

    @property
    def loaded(self) -> bool:
        return not self.classes

    def __str__(self) -> str:
        how = "loaded" if self.loaded else f"{self.classes[0]}: {self.message[:600]}"
        return f"{how} ({self.seconds:.2f} s, {self.growth / 2**20:.0f} MiB)"


def _status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def measured(load: Callable[[], Any]) -> Outcome:
    """Call `load` in this process, for readers that neither allocate nor call a library."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    classes, message = [], ""
    start = time.process_time()
    try:
        load()
    except BaseException as error:  # a panic of the tokenizers library is a direct child of BaseException
        classes = [cls.__name__ for cls in type(error).__mro__]
        message = str(error)
    return Outcome(classes, message[:20_000], time.process_time() - start, _status("VmHWM") - before)


def _child(load: Callable[[], Any]) -> Outcome:
    limit = _status("VmSize") + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    return measured(load)


def limited(load: Callable[[], Any]) -> Outcome:
    """Call `load` in a fork of this process. A child that dies or outlives `WALL_SECONDS` is an outcome, too."""
    reader, writer = os.pipe()
    gc.freeze()  # the child's collector leaves the parent's objects, and with them its pages, alone
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with suppress(BaseException), os.fdopen(writer, "w") as pipe:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):  # no terminal to prompt on, and no output of a crash
                os.dup2(null, stream)
            faulthandler.disable()
            json.dump(_child(load), pipe)
        os._exit(0)
    gc.unfreeze()
    os.close(writer)
    with os.fdopen(reader) as pipe:
        ready, _, _ = select.select([pipe], [], [], WALL_SECONDS)
        text = pipe.read() if ready else ""
    if not text:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if text:
        return Outcome(*json.loads(text))
    if not ready:
        return Outcome(["Timeout"], f"still running after {WALL_SECONDS:g} s", WALL_SECONDS, 0)
    return Outcome(["Crash"], f"the process ended with status {status}", 0.0, 0)


def assert_cheap(outcome: Outcome) -> None:
    assert outcome.seconds < CPU_SECONDS and outcome.growth < GROWTH_BYTES, str(outcome)


def assert_refused(outcome: Outcome, *mentions: object) -> None:
    """An error of ours that contains all of `mentions`, short, soon and in little memory."""
    assert not outcome.loaded, str(outcome)
    assert set(OURS) & set(outcome.classes), str(outcome)
    for text in mentions:
        assert str(text) in outcome.message, f"{text!r} is not in: {outcome}"
    assert len(outcome.message) < 3000, str(outcome)
    assert_cheap(outcome)
