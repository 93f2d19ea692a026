"""The cases of `benchmarks/kernels.py` run: here at tiny sizes, in the interpreter."""

import importlib
from pathlib import Path

import pytest
import torch

from deepseek_v3.kernels.dispatch import kernels

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernel_cases"
ROOMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("room", ROOMS)
def test_our_side_of_every_case_runs(room: str, device: torch.device) -> None:
    cases = list(importlib.import_module(f"benchmarks.kernel_cases.{room}").cases(device, small=True))
    assert cases
    with kernels("triton"):
        for case in cases:
            assert case.flops or case.bytes
            case.runs["ours"]()
            if "torch" in case.runs:
                case.runs["torch"]()


def test_every_room_with_kernels_has_cases() -> None:
    rooms = FOLDER.parents[1] / "deepseek_v3" / "kernels"
    assert ROOMS == sorted(path.parent.name for path in rooms.glob("*/triton_impl.py"))
