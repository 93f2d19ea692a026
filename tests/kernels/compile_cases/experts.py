"""Launches of the experts' kernels at the sizes of V3: hidden 7168, intermediate 2048, 64 of 256 experts, 8 chosen."""

import torch

from deepseek_v3.kernels.configs import kernel_config
from deepseek_v3.kernels.experts.triton_impl import expert_permutation, experts_backward, experts_forward

WGMMA = {
    "_gate_up_kernel": "BLOCK_M",
    "_grouped_product_kernel": "BLOCK_M",
    "_grad_activation_kernel": "BLOCK_M",
    "_grad_parameter_kernel": "BLOCK_P",
}


def step(
    rows: int, hidden: int = 7168, intermediate: int = 2048, dtype: torch.dtype = torch.bfloat16, experts: int = 64
) -> None:
    """Forward and backward with `rows` slots per expert."""
    x = torch.empty(rows * experts // 8, hidden, dtype=dtype, device="meta")
    indices = torch.empty(len(x), 8, dtype=torch.int64, device="meta")
    weights = torch.empty(len(x), 8, device="meta")
    gate_up = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device="meta")
    down = torch.empty(experts, hidden, intermediate, dtype=dtype, device="meta")
    sorted_choices = expert_permutation(indices, experts)
    experts_forward(x, weights, gate_up, down, *sorted_choices)
    experts_backward(x, x, weights, gate_up, down, *sorted_choices, frozen=False)


def with_tiles(bounds: dict[str, int]) -> None:
    step(bounds.get("rows", 1024))


def with_entry(bounds: dict[str, int]) -> None:
    """The largest size to which an entry with these bounds applies."""
    dtype = torch.bfloat16 if bounds.get("itemsize") == 2 else torch.float32
    for rows in (1024, 128, 32, 16):
        tile = kernel_config("experts_tiles", torch.device("meta"), rows=rows, itemsize=dtype.itemsize)
        if tile["BLOCK_M"] <= bounds.get("block_m", 128):
            return step(rows, dtype=dtype)
    raise AssertionError(f"no size for {bounds}")


def launch() -> None:
    step(1024)
    step(32, 97, 33, experts=3)  # rows that are not aligned to 16 bytes


CONFIGS = {
    "experts_tiles": with_tiles,
    "experts_gate_up": with_entry,
    "experts_product": with_entry,
    "experts_grad_activation": with_entry,
    "experts_grad_parameter": with_entry,
    "experts_combine": with_entry,
}
