"""Launches of the RoPE kernel at the shapes of V3 (128 heads of 128 + 64) and of Moonlight (16 heads)."""

import torch

from deepseek_v3.kernels.rope.triton_impl import rope, rope_in_place

WGMMA: dict[str, str] = {}


def step(tokens: int, heads: int = 128, dtype: torch.dtype = torch.bfloat16, interleave: bool = True) -> None:
    queries = torch.empty(1, tokens, heads, 192, dtype=dtype, device="meta")
    key = torch.empty(1, tokens, 576, dtype=dtype, device="meta")[..., 512:]
    cos = torch.empty(1, tokens, 32, dtype=dtype, device="meta")
    rope_in_place(queries, key, cos, cos, interleave)
    rope(queries, key, cos, cos, interleave, False)
    rope(queries, key, cos, cos, interleave, True)


def with_entry(bounds: dict[str, int]) -> None:
    step(bounds.get("tokens", 8192))


def launch() -> None:
    step(8192, heads=16)
    step(8192, interleave=False)
    step(8192, dtype=torch.float32)


CONFIGS = {"rope": with_entry}
