"""RMSNorm at V3's widths, forward and backward, beside torch and torch.compile."""

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.rms_norm import reference, triton_impl


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    rows, widths = (8, (64,)) if small else (8192, (7168, 2048, 512))
    for columns in widths:
        x, residual = torch.randn(2, rows, columns, device=device, dtype=torch.bfloat16).unbind()
        weight = torch.ones(columns, device=device, dtype=torch.bfloat16)
        shape, size = f"{rows}x{columns} bf16", x.numel() * x.element_size()
        yield Case(
            "rms_norm forward",
            shape,
            {
                "ours": lambda x=x, w=weight: triton_impl.rms_norm_forward(x, None, w, 1e-6),
                "torch": lambda x=x, w=weight: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6),
                "compile": lambda x=x, w=weight: _compiled(x, w, 1e-6),
            },
            bytes=2 * size,
            target=">= 85 % of the copy bandwidth",
            kernels=("rms_norm_forward",),
        )
        yield Case(
            "add_rms_norm forward",
            shape,
            {
                "ours": lambda x=x, r=residual, w=weight: triton_impl.rms_norm_forward(x, r, w, 1e-6),
                "torch": lambda x=x, r=residual, w=weight: reference.add_rms_norm(x, r, w, 1e-6),
            },
            bytes=4 * size,
            kernels=("rms_norm_forward",),
        )
        y, _, scale = triton_impl.rms_norm_forward(x, None, weight, 1e-6)
        leaf = x.clone().requires_grad_()
        graph = torch.nn.functional.rms_norm(leaf, weight.shape, weight, 1e-6)
        yield Case(
            "rms_norm backward",
            shape,
            {
                "ours": lambda x=x, g=residual, w=weight, s=scale: triton_impl.rms_norm_backward(g, None, x, w, s),
                "torch": lambda y=graph, x=leaf, g=residual: torch.autograd.grad(y, x, g, retain_graph=True),
            },
            bytes=3 * size,
            target=">= 85 % of the copy bandwidth",
            kernels=("rms_norm_backward",),
        )


@torch.compile(dynamic=False)
def _compiled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
