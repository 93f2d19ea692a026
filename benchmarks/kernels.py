"""Claim: the Triton kernels reach their targets on a Hopper GPU, beside torch, torch.compile and other libraries.

    python benchmarks/kernels.py [ROOM ...]          every kernel room, or those named
    python benchmarks/kernels.py --tune [ROOM ...]   also find each kernel's best configuration in the tables

Needs a CUDA GPU. Per operation and shape: microseconds (median, the L2 cache flushed before each run), TFLOP/s or
GB/s, and percent of what a plain bf16 matmul or a large copy reaches on the same card in the same run. Appends to
`benchmarks/results/`. `--tune` writes the best entry of each shape to a file beside it, to be copied into a table for
this GPU under `deepseek_v3/kernels/configs/`.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import RESULTS, write_results
from benchmarks.kernel_cases import Case
from deepseek_v3.kernels import configs

CASES = Path(__file__).with_name("kernel_cases")


def median_microseconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of `function()` on the GPU, the L2 cache flushed before each run."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def ceilings() -> tuple[float, float]:
    """What this card reaches now: TFLOP/s of a bf16 matmul, GB/s (read and written) of a large copy."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    flops = 2 * 8192**3 / median_microseconds(lambda: torch.mm(a, b)) / 1e6
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return flops, 2 * source.numel() / median_microseconds(lambda: target.copy_(source)) / 1e3


def measure(case: Case, tflops: float, bandwidth: float) -> list[dict[str, Any]]:
    """One row per side. A side that fails has its error instead of figures: a peer may not support a shape."""
    rows = []
    for side, run in case.runs.items():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "side": side}
        try:
            microseconds = median_microseconds(run)
        except Exception as error:
            if side == "ours":
                raise
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:160]})
            continue
        row["us"] = round(microseconds, 2)
        if case.flops:
            row["tflops"] = round(case.flops / microseconds / 1e6, 1)
            row["percent_of_matmul"] = round(100 * row["tflops"] / tflops, 1)
        if case.bytes:
            row["gb_per_s"] = round(case.bytes / microseconds / 1e3, 1)
            row["percent_of_copy"] = round(100 * row["gb_per_s"] / bandwidth, 1)
        rows.append(row | {"target": case.target} if side == "ours" else row)
    return rows


def tune(case: Case) -> dict[str, dict[str, Any]]:
    """The fastest of the checked-in entries for each of the case's kernels, the others as the tables have them."""
    best = {}
    for kernel in case.kernels:
        tables = [configs.read_table(path.stem) for path in sorted(configs.FOLDER.glob("*.json"))]
        times = {}
        for entry in (entry for table in tables for entry in table.get(kernel, [])):
            values = json.dumps({key: value for key, value in entry.items() if key != "max"})
            try:
                with configs.forced_config(kernel, entry):
                    times[values] = median_microseconds(case.runs["ours"], 10)
            except Exception as error:  # an entry for another GPU may not fit this one
                print(f"{kernel} {values}: {type(error).__name__}", file=sys.stderr)
        if times:
            best[kernel] = json.loads(min(times, key=times.__getitem__)) | {"us": round(min(times.values()), 2)}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", default=sorted(p.stem for p in CASES.glob("*.py") if p.stem != "__init__"))
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a CUDA GPU; none was found")
    device = torch.device("cuda")
    tflops, bandwidth = ceilings()
    print(f"{torch.cuda.get_device_name()}: bf16 matmul {tflops:.0f} TFLOP/s, copy {bandwidth:.0f} GB/s")
    rows, tuned = [], []
    for room in args.rooms:
        for case in importlib.import_module(f"benchmarks.kernel_cases.{room}").cases(device):
            if args.tune:
                tuned.append({"op": case.op, "shape": case.shape, "best": tune(case)})
                print(tuned[-1], flush=True)
            for row in measure(case, tflops, bandwidth):
                rows.append(row | {"matmul_tflops": round(tflops, 1), "copy_gb_per_s": round(bandwidth, 1)})
                print(row, flush=True)
            torch.cuda.empty_cache()
    name = configs.table_name(device)
    write_results(f"kernels_{name}", rows)
    if tuned:
        (RESULTS / f"tuning_{name}.json").write_text(json.dumps(tuned, indent=1))
        print(f"wrote tuning_{name}.json: copy what is better into deepseek_v3/kernels/configs/{name}.json")


if __name__ == "__main__":
    main()
