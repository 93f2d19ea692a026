"""Launches of the INT8 kernels at widths of V3: decoding, many rows, and routed experts; forward and backward."""

import torch

from deepseek_v3.kernels.int8.triton_impl import int8_linear_backward, int8_linear_forward

WGMMA = {"_int8_linear_kernel": "BLOCK_M"}


def linear(
    rows: int, experts: int = 0, dtype: torch.dtype = torch.bfloat16, inputs: int = 7168, outputs: int = 2048
) -> None:
    leading = [experts] if experts else []
    codes = torch.empty(*leading, outputs, inputs, dtype=torch.int8, device="meta")
    scale = torch.empty(*leading, outputs, 1, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta") if experts else None
    y = int8_linear_forward(torch.empty(rows, inputs, dtype=dtype, device="meta"), codes, scale, offsets)
    int8_linear_backward(y, codes, scale, offsets)


def launch() -> None:
    linear(1)
    linear(8192, dtype=torch.float16)
    linear(8191, inputs=576, outputs=97, dtype=torch.float32)  # blocks that are not full, along all three sizes
    linear(8, experts=256)
    linear(8192, experts=64, inputs=2048, outputs=7168)


def with_entry(bounds: dict[str, int]) -> None:
    rows = bounds.get("rows", 1024)
    linear(rows)
    linear(rows * 32, experts=32)


CONFIGS = {"int8_linear": with_entry, "quantize_activation_int8": with_entry}
