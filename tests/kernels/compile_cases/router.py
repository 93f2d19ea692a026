"""Launches of the router kernels: V3 (8 of 256 experts, 4 of 8 groups), Moonlight (6 of 64), awkward numbers."""

import torch

from deepseek_v3.kernels.router.triton_impl import route_backward, route_forward

WGMMA: dict[str, str] = {}


def step(tokens: int, experts: int = 256, top_k: int = 8, groups: int = 8, top_groups: int = 4) -> None:
    logits = torch.empty(tokens, experts, device="meta")
    mask = torch.empty(tokens, dtype=torch.bool, device="meta")
    for token_mask in (None, mask):
        weights, indices, _ = route_forward(logits, logits[0], top_k, groups, top_groups, True, 2.5, token_mask)
    route_backward(weights, logits, indices, True, 2.5)


def with_entry(bounds: dict[str, int]) -> None:
    experts = bounds.get("experts", 2048)
    step(bounds.get("tokens", 8192), experts)
    step(bounds.get("tokens", 8192), experts, groups=1, top_groups=1)


def launch() -> None:
    step(8192, 64, top_k=6, groups=1, top_groups=1)
    step(8192, 160, top_k=6, groups=8, top_groups=3)  # V2's 160 experts: groups of 20
    step(1, 72, top_k=32, groups=9, top_groups=7)


CONFIGS = {"route_forward": with_entry, "route_backward": with_entry}
