"""Launches of the FP8 quantizers at V3's hidden size. GPUs below sm_89 have no e4m3: there the ops raise an error."""

import torch

from deepseek_v3.kernels.fp8_quant import triton_impl

MIN_ARCH = 89  # the first with FP8 conversions and products
WGMMA: dict[str, str] = {}


def step(
    rows: int = 8192, columns: int = 7168, dtype: torch.dtype = torch.bfloat16, power_of_two: bool = False
) -> None:
    x = torch.empty(rows, columns, dtype=dtype, device="meta")
    offsets = torch.empty(257, dtype=torch.int32, device="meta")
    triton_impl.quantize_activation(x, None, rowwise=True, transposed=False, power_of_two=power_of_two)
    triton_impl.quantize_activation(x, None, rowwise=False, transposed=True, power_of_two=power_of_two)
    triton_impl.quantize_activation(x, offsets, rowwise=True, transposed=True, power_of_two=power_of_two)
    weight = torch.empty(2, 2048, columns, dtype=dtype, device="meta")
    triton_impl.quantize_weight(weight, transpose=False, power_of_two=power_of_two)
    codes, scale = triton_impl.quantize_weight(weight, transpose=True, power_of_two=power_of_two)
    triton_impl.dequantize_weight(codes, scale, dtype)


def with_entry(bounds: dict[str, int]) -> None:
    step(bounds.get("rows", 8192))


def launch() -> None:
    step(dtype=torch.float32, power_of_two=True)
    step(rows=8191, columns=576)  # tiles that are not full


CONFIGS = {
    "fp8_quantize_activation": with_entry,
    "fp8_quantize_activation_transposed": with_entry,
    "fp8_quantize_weight": with_entry,
    "fp8_dequantize_weight": with_entry,
}
