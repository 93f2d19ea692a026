"""What `benchmarks/kernels.py` measures: one file per room of `deepseek_v3/kernels`, each with a function `cases`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One operation at one shape: our kernel as `ours`, every peer under its own name, all on the same inputs."""

    op: str  # "rms_norm forward"
    shape: str  # "8192x7168 bf16"
    runs: dict[str, Callable[[], Any]]
    flops: float = 0  # floating-point operations of one run; 0 where the op is bound by memory
    bytes: float = 0  # bytes that one run has to read and write at least
    target: str = ""  # what `ours` should reach, in words
    kernels: tuple[str, ...] = field(default=())  # names in the configuration table that `--tune` may vary
