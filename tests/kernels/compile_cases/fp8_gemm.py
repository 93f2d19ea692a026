"""Launches of the FP8 matrix products at V3's widths. GPUs below sm_89 have no e4m3: there the ops raise an error."""

import torch

from deepseek_v3.kernels.fp8_gemm import triton_impl

MIN_ARCH = 89  # the first with FP8 conversions and products
WGMMA = {"_fp8_gemm_kernel": "BLOCK_M", "_fp8_grouped_wgrad_kernel": "BLOCK_N"}


def step(rows: int = 8192, inner: int = 7168, experts: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Forward and backward of a linear layer of 2048 outputs."""
    x = torch.empty(rows, inner, dtype=dtype, device="meta")
    weight = torch.empty(*([experts] if experts else []), 2048, inner, dtype=dtype, device="meta")
    offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta") if experts else None
    y, x_t, x_t_scale = triton_impl.linear_forward(x, weight, offsets, save=True)
    triton_impl.linear_backward(y, x_t, x_t_scale, weight, offsets, needs_x=True, needs_weight=True)


def with_entry(bounds: dict[str, int]) -> None:
    rows = bounds.get("rows", 8192)
    step(rows)
    step(rows * 32, experts=32)


def launch() -> None:
    step(rows=8191, inner=576, dtype=torch.float32)  # tiles that are not full, along all three sizes
    step(rows=8191, inner=576, experts=256)


CONFIGS = {"fp8_gemm": with_entry, "fp8_gemm_wgrad": with_entry, "fp8_grouped_wgrad": with_entry}
