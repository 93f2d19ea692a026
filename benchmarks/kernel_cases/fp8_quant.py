"""FP8 quantizers at V3's hidden size; a peer is the same in plain torch."""

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.fp8_quant import reference, triton_impl


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    rows, columns = (130, 256) if small else (8192, 7168)
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    elements, shape, target = x.numel(), f"{rows}x{columns} bf16", ">= 85 % of the copy bandwidth"
    yield Case(
        "fp8 quantize activation",
        shape,
        {
            "ours": lambda: triton_impl.quantize_activation(x, None, rowwise=True, transposed=False),
            "torch": lambda: reference.quantize_activation(x, False),
        },
        bytes=3 * elements + 4 * elements // 128,
        target=target,
        kernels=("fp8_quantize_activation",),
    )
    yield Case(
        "fp8 quantize activation, transposed",
        shape,
        {
            "ours": lambda: triton_impl.quantize_activation(x, None, rowwise=False, transposed=True),
            "torch": lambda: reference.quantize_activation_transposed(x, None, False),
        },
        bytes=3 * elements + 4 * elements // 128,
        target=target,
        kernels=("fp8_quantize_activation_transposed",),
    )
    yield Case(
        "fp8 quantize activation, both ways",
        shape,
        {"ours": lambda: triton_impl.quantize_activation(x, None, rowwise=True, transposed=True)},
        bytes=4 * elements + 8 * elements // 128,
        target=target,
        kernels=("fp8_quantize_activation_transposed",),
    )
    for transpose in (False, True):
        yield Case(
            "fp8 quantize weight" + (", transposed" if transpose else ""),
            shape,
            {
                "ours": lambda transpose=transpose: triton_impl.quantize_weight(x, transpose),
                "torch": lambda transpose=transpose: reference.quantize_weight(x, transpose, False),
            },
            bytes=3 * elements,
            target=target,
            kernels=("fp8_quantize_weight",),
        )
    codes, scale = triton_impl.quantize_weight(x, transpose=False)
    yield Case(
        "fp8 dequantize weight",
        shape,
        {
            "ours": lambda: triton_impl.dequantize_weight(codes, scale, torch.bfloat16),
            "torch": lambda: reference.dequantize(codes, scale, torch.bfloat16),
        },
        bytes=3 * elements,
        target=target,
        kernels=("fp8_dequantize_weight",),
    )
