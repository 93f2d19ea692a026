"""INT4 linear layers from decoding one token to a short prompt, at an expert's width of V3 and at 4096 x 4096; and the
routed experts of a layer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import Case
from benchmarks.kernel_cases.int8 import grouped_inputs
from deepseek_v3.kernels.int4 import int4_linear, pack_int4_for_cpu, quantize_int4, triton_impl


def _torch_int4(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """torch's own INT4 product on this device, if there is one for this size."""
    if not x.is_cuda:
        cpu_packed = pack_int4_for_cpu(packed, scale)
        return {"torch int4": lambda: int4_linear(x, packed, scale, cpu_packed)}
    nibbles = ((packed[..., None] >> torch.arange(0, 32, 4, device=x.device)) & 15).flatten(-2)
    group_size = nibbles.shape[1] // scale.shape[1]
    scale_and_zero = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).contiguous()
    try:
        weight = torch.ops.aten._convert_weight_to_int4pack(
            (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).to(torch.uint8), 8
        )
        torch.ops.aten._weight_int4pack_mm(x, weight, group_size, scale_and_zero)
    except RuntimeError:
        return {}
    return {"torch int4": lambda: torch.ops.aten._weight_int4pack_mm(x, weight, group_size, scale_and_zero)}


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    sizes = [(64, 32)] if small else [(7168, 2048), (2048, 7168), (4096, 4096)]
    for inputs, outputs in sizes:
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
        packed, scale = quantize_int4(weight, 32 if small else 128)
        for rows in (1,) if small else (1, 16, 64, 256, 1024):
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            yield Case(
                "int4_linear",
                f"{rows} rows, {inputs} -> {outputs} bf16",
                {
                    "ours": lambda x=x, p=packed, s=scale: triton_impl.int4_linear_forward(x, p, s),
                    "torch bf16": lambda x=x, w=weight: F.linear(x, w),
                }
                | _torch_int4(x, packed, scale),
                flops=2 * rows * inputs * outputs if rows > 64 else 0,
                bytes=packed.nbytes + scale.nbytes + x.nbytes + rows * outputs * x.element_size(),
                target=">= 70 % of the copy bandwidth" if rows <= 16 else "no slower than bf16",
                kernels=("int4_linear", "sum_splits") if rows <= triton_impl.MOST_ROWS else ("dequantize_int4",),
            )
        yield Case(
            "dequantize_int4",
            f"{outputs}x{inputs} bf16",
            {"ours": lambda p=packed, s=scale: triton_impl.dequantize_int4(p, s, torch.bfloat16)},
            bytes=packed.nbytes + scale.nbytes + weight.nbytes,
            target=">= 85 % of the copy bandwidth",
            kernels=("dequantize_int4",),
        )
    experts, inputs, outputs, chosen = (4, 64, 32, 2) if small else (64, 7168, 4096, 8)  # V3: a quarter of its experts
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
    packed, scale = quantize_int4(weight, 32 if small else 128)
    for tokens in (3,) if small else (1, 16, 64, 1024, 8192):
        x, offsets, used = grouped_inputs(tokens, chosen, experts, inputs, device)
        yield Case(
            "int4_grouped_linear",
            f"{tokens} tokens, {chosen} of {experts} experts, {inputs} -> {outputs} bf16",
            {
                "ours": lambda x=x, o=offsets: triton_impl.int4_grouped_linear_forward(x, packed, scale, o),
                "torch": lambda x=x, o=offsets: torch._grouped_mm(x, weight.mT, offs=o[1:]),
            },
            flops=2 * len(x) * inputs * outputs if tokens > 64 else 0,
            bytes=used * (packed[0].nbytes + scale[0].nbytes) + x.nbytes + len(x) * outputs * 2,
            target=">= 70 % of the copy bandwidth" if tokens <= 16 else "no slower than bf16",
            kernels=("int4_grouped_linear",),
        )
