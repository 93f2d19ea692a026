"""What the benchmarks share: timing in process CPU time on one thread, the machine's name, and the results file.

Shared machines make wall-clock time useless; the median of process CPU time on one thread repeats to a few percent.
"""

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def cpu_name() -> str:
    """Model name and whether it has AMX, the matrix units that decide bf16 speed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}{', AMX' if 'amx_bf16' in info else ', no AMX'}"


def median_seconds(function: Callable[[], Any], repeats: int, warm_up: int = 2) -> float:
    """Median process CPU seconds of `function()`."""
    for _ in range(warm_up):
        function()
    gc.collect()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def peak_rss_mib() -> float:
    """This process's peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run `script ARGUMENTS...` in a fresh process with one thread; it prints one JSON object as its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, *arguments]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a table and write the rows."""
    columns = list(rows[0])
    table = [columns] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(cpu_name())
    write_results(name, rows)


def write_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Append one line per row to `results/NAME.jsonl`, with the machine, the versions and the date."""
    import torch
    import transformers

    machine = {"cpu": cpu_name()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    machine |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps(row | machine) + "\n")
