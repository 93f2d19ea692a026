"""Launches of the cross-entropy kernels at the vocabularies of V3 (129,280) and Moonlight (163,840)."""

import torch

from deepseek_v3.kernels.linear_cross_entropy.triton_impl import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)

WGMMA: dict[str, str] = {}


def step(vocab: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> None:
    hidden = torch.empty(300, 7168, dtype=dtype, device="meta")
    weight = torch.empty(vocab, 7168, dtype=dtype, device="meta")
    labels = torch.empty(300, dtype=torch.int64, device="meta")
    row_weights = torch.empty(300, device="meta")
    _, _, _, grad_weight, largest = linear_cross_entropy_forward(hidden, weight, labels, row_weights, grad, grad)
    linear_cross_entropy_backward(grad_weight, largest, dtype)


def with_entry(bounds: dict[str, int]) -> None:
    step(bounds.get("vocab", 129280))


def launch() -> None:
    step(163840, torch.float32)
    step(163840, grad=False)
    step(8192)
    step(100003)  # odd


CONFIGS = {"cross_entropy": with_entry, "cross_entropy_scale": with_entry}
