"""Launches of the INT4 kernels at widths of V3: an expert's down projection, decoding and many rows."""

import torch

from deepseek_v3.kernels.int4.triton_impl import int4_linear_forward

WGMMA = {"_int4_linear_kernel": "BLOCK_N"}  # the product is transposed: its rows are outputs


def linear(rows: int, dtype: torch.dtype = torch.bfloat16, inputs: int = 2048, outputs: int = 7168, group: int = 128):
    packed = torch.empty(outputs, inputs // 8, dtype=torch.int32, device="meta")
    scale = torch.empty(outputs, inputs // group, dtype=torch.bfloat16, device="meta")
    int4_linear_forward(torch.empty(rows, inputs, dtype=dtype, device="meta"), packed, scale)


def split() -> None:
    linear(1, inputs=16384, outputs=64)


def launch() -> None:
    linear(16, torch.float16)
    linear(1, group=32)  # a block is one group
    linear(64, group=64)
    linear(64, group=256)
    linear(8192)
    linear(8192, torch.float32, group=32)
    split()


def with_entry(bounds: dict[str, int]) -> None:
    linear(bounds.get("rows", 256))


def dequantize(bounds: dict[str, int]) -> None:
    linear(8192)


CONFIGS = {"int4_linear": with_entry, "sum_splits": lambda bounds: split(), "dequantize_int4": dequantize}
