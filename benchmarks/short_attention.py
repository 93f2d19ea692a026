"""Claim: over short sequences on a CPU, this attention's gradients are faster than torch's and nearer to fp64.

    python benchmarks/short_attention.py

Forward and backward on one thread, in process CPU time, the median of nine. Errors: of the worst of the gradients of
query, key and value, norm of the difference over the norm, against autograd in fp64 of the same numbers. The scores
have a standard deviation of 4, as trained models' do rather than the 1 of fresh weights. Appends to results/.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import median_seconds, report
from deepseek_v3.kernels.short_attention import short_attention
from deepseek_v3.process import keep_freed_memory

HEADS = {"smollm2-deepseek-v3": (9, 128, 64), "moonlight-16b-a3b": (16, 192, 128)}  # heads, widths of key and value
SHAPES = ((32, 24), (16, 64), (16, 128), (16, 192), (16, 255))  # sequences, positions

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sides(scale: float) -> dict[str, Attention]:
    def torch_s(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        wide = F.pad(value, (0, key.shape[-1] - value.shape[-1]))  # without, torch has no fused kernel
        output = F.scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scale)
        return output[..., : value.shape[-1]]

    return {"torch": torch_s, "deepseek_v3": lambda query, key, value: short_attention(query, key, value, scale)}


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (torch.matmul(query, key.transpose(-1, -2)) * scale).masked_fill(hidden, float("-inf"))
    return torch.matmul(scores.softmax(-1), value)


def measure(model: str, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    heads, key_dim, value_dim = HEADS[model]
    generator = torch.Generator().manual_seed(0)
    widths = (key_dim, key_dim, value_dim, value_dim)
    *tensors, grad = (
        torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2) for width in widths
    )
    scale = 4 * key_dim**-0.5

    def gradients(attention: Attention, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(attention(*leaves), leaves, grad.to(inputs[0].dtype))

    expected = gradients(lambda *x: exact(*x, scale), *(x.double() for x in tensors))
    row: dict[str, Any] = {"heads of": model, "sequences": batch, "positions": length, "dtype": str(dtype)[6:]}
    for side, attention in sides(scale).items():
        found = gradients(attention, *tensors)
        error = max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))
        seconds = median_seconds(lambda attention=attention: gradients(attention, *tensors), repeats=9)
        row |= {f"{side} ms": 1e3 * seconds, f"{side} error": error}
    return row | {"times faster": row["torch ms"] / row["deepseek_v3 ms"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    dtypes = (torch.bfloat16, torch.float32)
    report("short_attention", [measure(m, *s, dtype) for m in HEADS for dtype in dtypes for s in SHAPES])
