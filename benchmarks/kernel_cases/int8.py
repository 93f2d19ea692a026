"""INT8 linear layers (W8A8) from decoding one token to a long prompt, routed experts, and quantizing activations."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.int8 import quantize_int8, triton_impl


def _int_mm(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """cuBLAS's integer product between torch's own quantization and scaling."""
    x_scale = x.float().abs().amax(1, keepdim=True) / 127
    total = torch._int_mm((x.float() / x_scale).round().to(torch.int8), codes.t())
    return (total.float() * scale.float().t() * x_scale).to(x.dtype)


def grouped_inputs(
    tokens: int, chosen: int, experts: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows sorted by expert, bf16, their offsets, and how many experts have any."""
    indices = torch.rand(tokens, experts, device=device).topk(chosen).indices
    counts = indices.flatten().bincount(minlength=experts)
    offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    x = torch.randn(tokens * chosen, width, device=device, dtype=torch.bfloat16)
    return x, offsets, int((counts > 0).sum())


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    for inputs, outputs in [(64, 32)] if small else [(7168, 2048), (2048, 7168), (4096, 4096)]:
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
        codes, scale = quantize_int8(weight)
        for rows in (1,) if small else (1, 16, 64, 256, 8192):
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            peers = {"torch bf16": lambda x=x, w=weight: F.linear(x, w)}
            if rows > 16:  # fewer are not taken on GPUs
                peers["torch int8"] = lambda x=x, c=codes, s=scale: _int_mm(x, c, s)
            yield Case(
                "int8_linear",
                f"{rows} rows, {inputs} -> {outputs} bf16",
                {"ours": lambda x=x, c=codes, s=scale: triton_impl.int8_linear_forward(x, c, s, None)} | peers,
                flops=2 * rows * inputs * outputs if rows > 64 else 0,
                bytes=codes.nbytes + scale.nbytes + x.nbytes + rows * outputs * x.element_size(),
                target=">= 70 % of the copy bandwidth" if rows <= 16 else "faster than bf16",
                kernels=("int8_linear", "quantize_activation_int8"),
            )
    experts, inputs, outputs, chosen = (4, 64, 32, 2) if small else (64, 7168, 4096, 8)  # V3: a quarter of its experts
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
    codes, scale = quantize_int8(weight)
    for tokens in (3,) if small else (1, 16, 64, 8192):
        x, offsets, used = grouped_inputs(tokens, chosen, experts, inputs, device)
        yield Case(
            "int8_grouped_linear",
            f"{tokens} tokens, {chosen} of {experts} experts, {inputs} -> {outputs} bf16",
            {
                "ours": lambda x=x, o=offsets: triton_impl.int8_linear_forward(x, codes, scale, o),
                "torch": lambda x=x, o=offsets: torch._grouped_mm(x, weight.mT, offs=o[1:]),
            },
            flops=2 * len(x) * inputs * outputs if tokens > 64 else 0,
            bytes=used * (codes[0].nbytes + scale[0].nbytes) + x.nbytes + len(x) * outputs * 2,
            target=">= 70 % of the copy bandwidth" if tokens <= 16 else "faster than bf16",
            kernels=("int8_linear", "quantize_activation_int8"),
        )
    x = torch.randn(*((3, 64) if small else (8192, 7168)), device=device, dtype=torch.bfloat16)
    yield Case(
        "quantize_activation_int8",
        f"{x.shape[0]}x{x.shape[1]} bf16",
        {"ours": lambda: triton_impl.quantize_activation_int8(x)},
        bytes=x.nbytes + x.numel() + 4 * len(x),
        target=">= 80 % of the copy bandwidth",
        kernels=("quantize_activation_int8",),
    )
