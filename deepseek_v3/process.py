"""What a run asks of its process: a lock on its folder, signals that stop it between steps, memory, plain lines, and
what it ran on and with."""

import ctypes
import fcntl
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: a step's tensors are the next step's, and page faults cost some 10 % of it."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Let `peak_memory` of `device` count from now on, where the system can do that (Linux, GPUs)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.init()  # before it nothing can be reset
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at most: of torch's allocator on a GPU; otherwise resident, the libraries' code and data included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Two runs never write to one folder; the kernel frees the lock of a process that died."""
    with (output / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(f"{output}: in use by another run ({file.read().strip() or 'unknown process'})") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nstopping after this step (Ctrl-C again to stop at once)\n")  # print is not reentrant

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller handles signals
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def first_rank() -> bool:
    """Whether this process is the one that prints, draws and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(received: list[int]) -> bool:
    """Whether a signal reached any rank: all stop after the same step, or the others would wait for ever."""
    return any(all_ranks(bool(received)))


def say(message: str) -> None:
    """One plain line of the first rank, without disturbing a progress bar."""
    if first_rank():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def environment(device: torch.device | str) -> dict[str, Any]:
    """For a run's record: versions, hardware, and the commit of this package's sources.

    `git` is the commit's hash, with "+changes" if tracked files of the package differ from it; None for a package
    that was installed without its repository.
    """
    device = torch.device(device)
    return {
        "package": sys.modules[__package__].__version__,
        "git": _commit(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _commit(folder: Path) -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None  # no git here
        return done.stdout.strip() if done.returncode == 0 else None

    # a package installed inside somebody else's repository is not tracked there
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return f"{git('rev-parse', 'HEAD')}{'+changes' if git('status', '--porcelain', '-uno', '.') else ''}"


def _processor() -> str:
    """The processor's name and the number of its cores that this process may use."""
    names = [line.split(":")[1].strip() for line in _read(Path("/proc/cpuinfo")) if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def _read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
