"""What a run asks of its process: a lock on its folder, signals that stop it between steps, memory, plain lines."""

import ctypes
import fcntl
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: a step's tensors are the next step's, and page faults cost some 10 % of it."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library


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


def any_rank(received: list[int]) -> bool:
    """Whether a signal reached any rank: all stop after the same step, or the others would wait for ever."""
    if not dist.is_initialized():
        return bool(received)
    flags: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, bool(received))
    return any(flags)


def say(message: str) -> None:
    """One plain line of the first rank, without disturbing a progress bar."""
    if dist.is_initialized() and dist.get_rank():
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()
