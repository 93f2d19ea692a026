"""Launches of the RMSNorm kernels at the widths of V3: hidden 7168, query latent 1536, key-value latent 512."""

import torch

from deepseek_v3.kernels.rms_norm.triton_impl import rms_norm_backward, rms_norm_forward

WGMMA: dict[str, str] = {}


def step(columns: int, dtype: torch.dtype = torch.bfloat16, add: bool = True) -> None:
    x = torch.empty(8192, columns, dtype=dtype, device="meta")
    weight, residual = x[0], x if add else None
    y, total, scale = rms_norm_forward(x, residual, weight, 1e-6)
    rms_norm_backward(y, total if add else None, x, weight, scale)


def with_entry(bounds: dict[str, int]) -> None:
    step(bounds.get("columns", 7168))


def launch() -> None:
    step(512, add=False)
    step(1536, torch.float32, add=False)


CONFIGS = {"rms_norm_forward": with_entry, "rms_norm_backward": with_entry}
