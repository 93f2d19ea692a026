"""The one rule that chooses an implementation: CUDA tensors go to the Triton kernels, all others to plain torch.

The environment variable `DEEPSEEK_V3_KERNELS` overrides it for the process: `reference` (plain torch everywhere),
`triton` (Triton everywhere, which on CPU tensors needs Triton's interpreter, `TRITON_INTERPRET=1`) or `auto`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

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
    return _mode == "triton" or (tensor.is_cuda and _HAS_TRITON)


@contextmanager
def kernels(mode: Mode) -> Iterator[None]:
    """Choose for the duration of a `with` block: `"auto"`, `"reference"` or `"triton"`."""
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before
