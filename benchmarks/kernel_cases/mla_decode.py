"""Absorbed MLA decode of one token per sequence over 8192 latents, at V3's heads (128) and Moonlight's (16)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.mla_decode import reference, triton_impl

try:
    import flash_mla
except ImportError:
    flash_mla = None

LATENT, ROPE = 512, 64
SCALE = (128 + ROPE) ** -0.5


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    sizes = [(2, 4)] if small else [(batch, heads) for heads in (128, 16) for batch in (1, 16, 64, 128)]
    total = 80 if small else 8192
    for batch, heads in sizes:

        def random(*shape, batch=batch):
            return torch.randn(batch, *shape, device=device, dtype=torch.bfloat16)

        inputs = random(1, heads, LATENT), random(1, heads, ROPE), random(total, LATENT), random(total, ROPE)
        causal = torch.arange(2 * total, device=device) < total
        static = torch.cat((inputs[2],) * 2, dim=1), torch.cat((inputs[3],) * 2, dim=1), causal.view(1, 1, 1, -1)
        peers = {"torch": lambda x=inputs: reference.mla_decode(*x, SCALE)}
        if batch * heads <= 128:  # it may copy the latents to every head
            peers["SDPA"] = _sdpa(*inputs)
        if flash_mla is not None and device.type == "cuda":
            peers["FlashMLA"] = _flash_mla(*inputs)
        rates = {
            "flops": 2 * batch * heads * total * (2 * LATENT + ROPE),
            "bytes": 2 * batch * total * (LATENT + ROPE),
            "target": ">= 75 % of the copy bandwidth at batch 64",
            "kernels": ("mla_decode", "mla_decode_merge"),
        }
        shape = f"B={batch} T={total}, {heads} heads bf16"
        yield Case(
            "mla_decode", shape, {"ours": lambda x=inputs: triton_impl.mla_decode(*x, SCALE, None), **peers}, **rates
        )
        yield Case(
            "mla_decode, static cache half full",
            shape,
            {
                "ours": lambda x=inputs, s=static: triton_impl.mla_decode(*x[:2], *s[:2], SCALE, s[2]),
                "torch": lambda x=inputs, s=static: reference.mla_decode(*x[:2], *s[:2], SCALE, s[2]),
            },
            **rates,
        )


def _sdpa(
    query_latent: torch.Tensor, query_rope: torch.Tensor, latent: torch.Tensor, key_rope: torch.Tensor
) -> Callable[[], torch.Tensor]:
    query = torch.cat((query_latent, query_rope), dim=-1).transpose(1, 2)
    key, value = torch.cat((latent, key_rope), dim=-1).unsqueeze(1), latent.unsqueeze(1)
    return lambda: F.scaled_dot_product_attention(query, key, value, scale=SCALE, enable_gqa=True)


def _flash_mla(
    query_latent: torch.Tensor, query_rope: torch.Tensor, latent: torch.Tensor, key_rope: torch.Tensor
) -> Callable[[], Any]:
    query = torch.cat((query_latent, query_rope), dim=-1)
    batch, total = latent.shape[:2]
    pages = torch.cat((latent, key_rope), dim=-1).view(-1, 64, 1, LATENT + ROPE)
    table = torch.arange(len(pages), dtype=torch.int32, device=latent.device).view(batch, -1)
    lengths = torch.full((batch,), total, dtype=torch.int32, device=latent.device)
    plan = flash_mla.get_mla_metadata(lengths, query.shape[2], 1)
    return lambda: flash_mla.flash_mla_with_kvcache(
        query, pages, table, lengths, LATENT, *plan, softmax_scale=SCALE, causal=False
    )
