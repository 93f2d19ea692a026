"""Compiles every kernel for a GPU on a machine without one, and checks what the compiler made of it.

    python tests/kernels/compile_check.py ARCH [ROOM ...]     (TRITON_INTERPRET unset; ARCH 80, 89, 90 or 100)

`compile_cases/<room>.py` calls the room's launchers on meta tensors at real sizes; the launches are caught and
compiled instead. That is repeated with each entry of the configuration tables for that architecture. A line per kernel
is printed, and the exit status is 1 if one does not compile, spills, wants more shared memory than a block has, or
lacks the matrix instructions it should have on sm_90 (below fp32, with tiles of 64 rows or more).
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from deepseek_v3.kernels.configs import forced_config, read_table  # noqa: E402

CASES = Path(__file__).with_name("compile_cases")
# Bytes that one block can have, which triton.compile does not look at. 8.6 and 12.0 have as little as 8.9.
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}


class NoDevice:
    """A driver for a GPU that is not there: everything up to the launch works."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def assembler_report(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as ptxas reports them for a kernel's PTX."""
    name = f"sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        flags = ["-v", "--regAllocOptLevel=2", f"--gpu-name={name}"]  # as Triton calls it
        command = [get_ptxas(arch).path, *flags, file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled and registers, log
    return int(registers.group(1)), sum(map(int, spilled.groups()))


class Recorder:
    """Replaces `JITFunction.run`: compiles for `arch`, reports, launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.failures: list[str] = []
        self.compiled: set[str] = set()
        self.launched: set[str] = set()  # kernels met in the current pass
        # Kernels of the current room that must use Hopper's matrix instructions -> the option with their tiles' rows.
        self.wgmma: dict[str, str] = {}
        self._run = JITFunction.run

    def __call__(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        name = function.__name__
        self.launched.add(name)
        options = {k: v for k, v in kwargs.items() if k.isupper() or k.startswith("num_")}
        try:
            kernel = self._run(function, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            self.failures.append(f"{name} {options}: {type(error).__name__}: {error}")
            return None
        if kernel.hash in self.compiled:
            return kernel
        self.compiled.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        registers, spilled = assembler_report(ptx, self.arch)
        shared, wgmma = kernel.metadata.shared, ptx.count("wgmma.mma_async")
        problems = []
        if shared > SHARED_MEMORY[self.arch]:
            problems.append(f"{shared} bytes of shared memory, a block has {SHARED_MEMORY[self.arch]}")
        if spilled:
            problems.append(f"{spilled} bytes spilled")
        assert name not in self.wgmma or self.wgmma[name] in options, f"{name} has no option {self.wgmma[name]}"
        narrow = re.search(r"bf16|fp16|fp8", " ".join(map(str, kernel.src.signature.values())))  # not fp32 throughout
        if self.arch == 90 and narrow and options.get(self.wgmma.get(name), 0) >= 64 and not wgmma:
            problems.append("no wgmma")
        self.failures += [f"{name} {options}: {problem}" for problem in problems]
        print(
            f"sm_{self.arch} {name:44} {registers:3} registers {shared:6} B shared {wgmma:3} wgmma "
            f"{ptx.count('mma.sync'):3} mma.sync {ptx.count('cp.async.bulk.tensor'):2} TMA "
            f"{time.perf_counter() - start:4.1f} s  {options} {'; '.join(problems)}",
            flush=True,
        )
        return kernel


def check(arch: int, rooms: list[str]) -> list[str]:
    """Compile the cases of `rooms` for `arch`; returns what is wrong."""
    driver.set_active(NoDevice(arch))
    recorder = Recorder(arch)
    JITFunction.run = lambda self, *args, **kwargs: recorder(self, *args, **kwargs)
    tables = [table for table in (read_table(f"sm_{arch}"), read_table("default")) if table]
    for room in rooms:
        cases = importlib.import_module(f"tests.kernels.compile_cases.{room}")
        if arch < getattr(cases, "MIN_ARCH", 0):
            continue
        recorder.wgmma, recorder.launched = cases.WGMMA, set()
        cases.launch()
        for table in tables:
            for kernel in table.keys() & cases.CONFIGS.keys():
                for entry in table[kernel]:
                    with forced_config(kernel, entry):
                        cases.CONFIGS[kernel](entry.get("max", {}))
        kernels = importlib.import_module(f"deepseek_v3.kernels.{room}.triton_impl")
        top_level = {n for n, f in vars(kernels).items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
        recorder.failures += [f"{room}: no case launches {name}" for name in sorted(top_level - recorder.launched)]
    return recorder.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", type=int, choices=sorted(SHARED_MEMORY))
    parser.add_argument("rooms", nargs="*", default=sorted(p.stem for p in CASES.glob("*.py") if p.stem != "__init__"))
    args = parser.parse_args()
    failures = check(args.arch, args.rooms)
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
