"""The peak of the memory that this process has resident."""

import re
import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Let the peak count from now on, where the system can do that (Linux)."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_memory() -> int:
    """Bytes that were resident at most since then, the libraries' code and data included."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found.group(1)) * 1024
