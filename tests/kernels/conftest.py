"""Kernel tests: in Triton's interpreter on CPU tensors, or (TRITON_INTERPRET=0, -m gpu) the same ones on a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepseek_v3.kernels.dispatch import kernels

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
if INTERPRETED:
    from tests.kernels import interpreter_bf16  # noqa: F401


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents and "device" in item.fixturenames:
            item.add_marker("gpu")


@pytest.fixture
def device() -> torch.device:
    """Where a kernel test puts its tensors."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN (or the largest integer), so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    """The ops run their Triton kernels, on CPU tensors too."""
    with kernels("triton"):
        yield
