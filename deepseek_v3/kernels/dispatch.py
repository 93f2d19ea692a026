"""The one rule that chooses an implementation: CUDA tensors go to the Triton kernels, all others to plain torch.

GPUs below compute capability 8.0 count as others: the kernels' tiles are made for more shared memory than they have.

The environment variable `DEEPSEEK_V3_KERNELS` overrides it for the process: `reference` (plain torch everywhere),
`triton` (Triton everywhere, which on CPU tensors needs Triton's interpreter, `TRITON_INTERPRET=1`) or `auto`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

Mode = Literal["auto", "reference", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def _checked(mode: str) -> Mode:
    if mode not in get_args(Mode):
        raise ValueError(f"DEEPSEEK_V3_KERNELS is {mode!r}; allowed: {', '.join(get_args(Mode))}")
    if mode == "triton" and not _HAS_TRITON:
        raise ValueError("DEEPSEEK_V3_KERNELS is 'triton', but the package triton is not installed")
    return mode  # type: ignore[return-value]


_mode: Mode = _checked(os.environ.get("DEEPSEEK_V3_KERNELS", "auto"))


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernels. They compute in fp32, so fp64 is always left to torch."""
    if _mode == "reference" or tensor.dtype not in DTYPES:
        return False
    return _mode == "triton" or (tensor.is_cuda and _HAS_TRITON and _supported(tensor.device))


@torch.compiler.assume_constant_result  # torch.compile traces neither the cache nor the question
def _supported(device: torch.device) -> bool:
    return _capability(device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_its_device(function: Callable) -> Callable:
    """`function(tensor, ...)` on the tensor's device: Triton launches on the current one and on its stream, wherever
    the tensors are."""

    @wraps(function)
    def run(tensor: torch.Tensor, *args: Any) -> Any:
        device = tensor.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(tensor, *args)
        with torch.cuda.device(device):
            return function(tensor, *args)

    return run


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], torch.library.CustomOpDef]:
    """`torch.library.custom_op`, run `on_its_device`."""
    return lambda function: torch.library.custom_op(name, on_its_device(function), mutates_args=mutates_args)


@contextmanager
def kernels(mode: Mode) -> Iterator[None]:
    """Choose for the duration of a `with` block: `"auto"`, `"reference"` or `"triton"`."""
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before
