"""Launches of the INT4 kernels at widths of V3: an expert's down projection, decoding, many rows and all experts."""

import torch

from deepseek_v3.kernels.int4.triton_impl import (
    int4_grouped_linear_backward,
    int4_grouped_linear_forward,
    int4_linear_forward,
)

WGMMA = {"_int4_linear_kernel": "BLOCK_N"}  # the product is transposed: its rows are outputs


def linear(rows: int, dtype: torch.dtype = torch.bfloat16, inputs: int = 2048, outputs: int = 7168, group: int = 128):
    packed = torch.empty(outputs, inputs // 8, dtype=torch.int32, device="meta")
    scale = torch.empty(outputs, inputs // group, dtype=torch.bfloat16, device="meta")
    int4_linear_forward(torch.empty(rows, inputs, dtype=dtype, device="meta"), packed, scale)


def grouped(rows: int, experts: int, dtype: torch.dtype = torch.bfloat16, group: int = 128) -> None:
    packed = torch.empty(experts, 7168, 256, dtype=torch.int32, device="meta")
    scale = torch.empty(experts, 7168, 2048 // group, dtype=dtype, device="meta")
    offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta")
    y = int4_grouped_linear_forward(torch.empty(rows, 2048, dtype=dtype, device="meta"), packed, scale, offsets)
    int4_grouped_linear_backward(y, packed, scale, offsets)


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
    grouped(8, 256)
    grouped(8192, 64, torch.float16, group=32)
    grouped(8192, 64, torch.float32)


def with_entry(bounds: dict[str, int]) -> None:
    linear(bounds.get("rows", 256))


def with_grouped_entry(bounds: dict[str, int]) -> None:
    grouped(bounds.get("rows", 256) * 32, 32, torch.bfloat16 if "itemsize" in bounds else torch.float32)


def dequantize(bounds: dict[str, int]) -> None:
    linear(8192)


CONFIGS = {
    "int4_linear": with_entry,
    "int4_grouped_linear": with_grouped_entry,
    "sum_splits": lambda bounds: split(),
    "dequantize_int4": dequantize,
}
