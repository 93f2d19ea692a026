"""FP8 matrix products of a linear layer and of experts, beside torch in bf16 and its FP8 with a scale per tensor."""

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.fp8_gemm import triton_impl
from deepseek_v3.kernels.fp8_quant.triton_impl import quantize_activation, quantize_weight

TARGET = ">= 1.4 times torch in bf16"


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    shapes = [(64, 128, 256)] if small else [(4096, 4096, 7168), (8192, 7168, 2048)]
    for rows, columns, inner in shapes:
        yield from _linear(device, rows, columns, inner)
    rows, columns, inner, experts = (300, 128, 256, 3) if small else (32768, 2 * 2048, 7168, 32)
    yield from _experts(device, rows, columns, inner, experts)


def _linear(device: torch.device, rows: int, columns: int, inner: int) -> Iterator[Case]:
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    weight = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    a, a_scale, x_t, x_t_scale = quantize_activation(x, None, rowwise=True, transposed=True)
    g, g_scale, g_t, g_t_scale = quantize_activation(grad, None, rowwise=True, transposed=True)
    products = {
        "forward": ((a, a_scale, *quantize_weight(weight, False)), (x, weight.T), "fp8_gemm"),
        "input gradient": ((g, g_scale, *quantize_weight(weight, True)), (grad, weight), "fp8_gemm"),
        "weight gradient": ((g_t, g_t_scale, x_t, x_t_scale), (grad.T, x), "fp8_gemm_wgrad"),
    }
    one = torch.ones((), device=device)
    for name, (operands, bf16, kernel) in products.items():
        runs = {
            "ours": lambda o=operands: triton_impl.gemm(*o, None, torch.bfloat16),
            "torch bf16": lambda m=bf16: torch.mm(*m),
        }
        if device.type == "cuda":  # the same codes; what a scale per tensor costs, not the same result
            runs["torch per-tensor fp8"] = lambda o=operands: torch._scaled_mm(
                o[0], o[2].T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        shape = f"{rows}x{columns}x{inner}"
        yield Case(f"fp8 gemm {name}", shape, runs, 2 * rows * columns * inner, target=TARGET, kernels=(kernel,))
    yield Case(
        "fp8 linear forward",
        f"{rows}x{columns}x{inner}",
        {
            "ours": lambda: triton_impl.linear_forward(x, weight, None, save=True),
            "torch bf16": lambda: torch.nn.functional.linear(x, weight),
        },
        2 * rows * columns * inner,
        kernels=("fp8_gemm",),
    )
    yield Case(
        "fp8 linear backward",
        f"{rows}x{columns}x{inner}",
        {
            "ours": lambda: triton_impl.linear_backward(grad, x_t, x_t_scale, weight, None, True, True),
            "torch bf16": lambda: (grad @ weight, grad.T @ x),
        },
        4 * rows * columns * inner,
        kernels=("fp8_gemm", "fp8_gemm_wgrad"),
    )


def _experts(device: torch.device, rows: int, columns: int, inner: int, experts: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(experts, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1), chosen.bincount(minlength=experts).cumsum(0)]).to(device, torch.int32)
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    weight = torch.randn(experts, columns, inner, device=device, dtype=torch.bfloat16)
    a, a_scale, x_t, x_t_scale = quantize_activation(x, offsets, rowwise=True, transposed=True)
    g, g_scale, g_t, g_t_scale = quantize_activation(grad, offsets, rowwise=True, transposed=True)
    b, b_t = quantize_weight(weight, False), quantize_weight(weight, True)
    ends = offsets[1:]
    runs = {
        "forward": (
            lambda: triton_impl.gemm(a, a_scale, *b, offsets, torch.bfloat16),
            lambda: torch._grouped_mm(x, weight.mT, offs=ends),
        ),
        "input gradient": (
            lambda: triton_impl.gemm(g, g_scale, *b_t, offsets, torch.bfloat16),
            lambda: torch._grouped_mm(grad, weight, offs=ends),
        ),
        "weight gradient": (
            lambda: triton_impl.grouped_wgrad(g_t, g_t_scale, x_t, x_t_scale, offsets, torch.bfloat16),
            lambda: torch._grouped_mm(grad.T, x, offs=ends),
        ),
    }
    for name, (ours, bf16) in runs.items():
        yield Case(
            f"fp8 grouped gemm {name}",
            f"{rows}x{columns}x{inner} E={experts}",
            {"ours": ours, "torch bf16": bf16},
            2 * rows * columns * inner,
            target=TARGET,
            kernels=("fp8_grouped_wgrad" if name == "weight gradient" else "fp8_gemm",),
        )
