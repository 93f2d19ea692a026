"""Runs `compile_check.py` over every room, in processes of their own: the interpreter of this one cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOMS = sorted(path.stem for path in (HERE / "compile_cases").glob("*.py"))


def compile_check(*arguments: str) -> subprocess.CompletedProcess:
    return compiling(str(HERE / "compile_check.py"), *arguments)


def compiling(*arguments: str) -> subprocess.CompletedProcess:
    """Python with `arguments`, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arch", ["80", "89", "90", "100"])
def test_every_kernel_compiles(arch: str) -> None:
    result = compile_check(arch)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= len(ROOMS)


def test_every_room_with_kernels_is_checked() -> None:
    kernels = HERE.parents[1] / "deepseek_v3" / "kernels"
    assert ROOMS == sorted(path.parent.name for path in kernels.glob("*/triton_impl.py"))


BAD = """
import torch
import triton
import triton.language as tl


@triton.jit
def _bad_kernel(x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, K)
    x = tl.load(x_ptr + row[:, None] * K + column[None, :])
    y = tl.load(y_ptr + row[:, None] * K + column[None, :])
    {body}


def bad(m, k):
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
    _bad_kernel[(1,)](x, x, M=m, K=k, num_warps=4)
"""


@pytest.mark.parametrize(
    "body, sizes, complaint",
    [
        ("tl.store(x_ptr + row[:, None] * M + row[None, :], tl.dot(x, tl.trans(y)))", (128, 1024), "shared memory"),
        ("tl.store(x_ptr + row[:, None] * M + row[None, :], tl.dot(x, tl.trans(y)))", (256, 64), "spilled"),
        ("tl.store(x_ptr + row[:, None] * K + column[None, :], x + y)", (64, 64), "no wgmma"),
        ("tl.store(x_ptr + row[:, None] * K + column[None, :], x + undefined)", (64, 64), "undefined"),
    ],
)
def test_the_check_sees_what_is_wrong(body, sizes, complaint, tmp_path) -> None:
    """The four things it looks for, each in a kernel made for it."""
    (tmp_path / "bad_kernel.py").write_text(BAD.format(body=body))
    script = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(tmp_path)!r}]
import compile_check, bad_kernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
driver.set_active(compile_check.NoDevice(90))
recorder = compile_check.Recorder(90)
recorder.wgmma = {{"_bad_kernel": "M"}}
JITFunction.run = lambda self, *args, **kwargs: recorder(self, *args, **kwargs)
bad_kernel.bad{sizes}
print(recorder.failures)
"""
    found = compiling("-c", script)
    assert complaint in found.stdout, found.stdout + found.stderr
