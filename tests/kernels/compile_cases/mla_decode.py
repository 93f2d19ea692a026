"""Launches of the MLA decode kernels at the sizes of V3 and Moonlight: latents of 512, 64 rotary columns."""

import torch

from deepseek_v3.kernels.mla_decode.triton_impl import mla_decode

WGMMA = {"_mla_decode_kernel": "BLOCK_M"}


def step(rows: int, dtype: torch.dtype, mask: torch.dtype | None, length: int = 1) -> None:
    batch, keys, heads = 1, 8192, rows // length
    query_latent = torch.empty(batch, length, heads, 512, dtype=dtype, device="meta")
    query_rope = torch.empty(batch, length, heads, 64, dtype=dtype, device="meta")
    latent = torch.empty(batch, keys, 512, dtype=dtype, device="meta")
    key_rope = torch.empty(batch, keys, 64, dtype=dtype, device="meta")
    masks = None if mask is None else torch.empty(batch, 1, length, keys, dtype=mask, device="meta")
    mla_decode(query_latent, query_rope, latent, key_rope, 0.1, masks)


def with_entry(bounds: dict[str, int]) -> None:
    rows = bounds.get("rows", 128)
    dtype = torch.bfloat16 if bounds.get("bytes") == 2 else torch.float32
    for mask in (None, torch.bool, torch.float32):
        step(rows, dtype, mask)
    step(rows, dtype, torch.bool, length=8)


def with_merge(bounds: dict[str, int]) -> None:
    step(16, torch.bfloat16, None)  # few programs: the keys are split


def launch() -> None:
    step(128, torch.float16, torch.float16)


CONFIGS = {"mla_decode": with_entry, "mla_decode_merge": with_merge}
