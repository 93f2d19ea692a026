"""Auxiliary-loss-free load balancing (paper 2.1.2): the routing bias's update rule, and measures of the load."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..modeling_deepseek_v3 import DeepseekV3TopkRouter


def routers(model: nn.Module) -> dict[str, DeepseekV3TopkRouter]:
    """All routers by module name, MTP layers included: found by type, so that none can be missed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeepseekV3TopkRouter)}


def load_counts(model: nn.Module) -> torch.Tensor:
    """How often each expert was chosen by a real token since the last update, over all ranks: `[L, E]` int64 on CPU.

    `L` counts the MoE layers in the order of `routers`. One all-reduce for all layers.
    """
    counts = []
    for router in routers(model).values():
        zeros = torch.zeros(router.num_experts, dtype=torch.int64, device=router.weight.device)
        counts.append(zeros if router.load_counts is None else router.load_counts)
    if not counts:
        return torch.zeros(0, 0, dtype=torch.int64)
    stacked = torch.stack([count.to(counts[0].device) for count in counts])  # layers may lie on several devices
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(stacked)
    return stacked.cpu()


@torch.no_grad()
def update_routing_bias(model: nn.Module, speed: float) -> torch.Tensor:
    """Raise the bias of underloaded experts by `speed` (gamma), lower that of overloaded ones, and forget the counts.

    The step is centred per layer: a common shift changes no choice, and without it the mean would drift. Layers that
    saw no token keep their bias. fp32. Returns the counts `[L, E]` the update was made from.
    """
    counts = load_counts(model)
    for router, count in zip(routers(model).values(), counts, strict=True):
        bias = router.e_score_correction_bias
        count = count.to(bias.device, torch.float32)
        step = torch.sign(count.mean() - count)
        bias += speed * (step - step.mean())
        router.load_counts = None
    return counts


class RoutingBiasHook:
    """Optimizer pre-step hook: `optimizer.register_step_pre_hook(RoutingBiasHook(model))`.

    Runs once per real optimizer step, so gradient accumulation is covered; not where a gradient scaler for fp16 lets
    a fused optimizer skip its step. `speed` may be changed between steps;
    `counts` holds the last step's loads `[L, E]`.
    """

    def __init__(self, model: nn.Module, speed: float | None = None) -> None:
        self.model = model
        self.speed: float = model.config.bias_update_speed if speed is None else speed
        self.counts = torch.zeros(0, 0, dtype=torch.int64)

    def __call__(self, optimizer: object = None, *_: object) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler around the step of a fused optimizer
        if found_inf is not None and found_inf.item():
            return
        self.counts = update_routing_bias(self.model, self.speed)


@dataclass(frozen=True)
class LoadStatistics:
    """Of one set of counts, each averaged over the layers that saw tokens.

    max_violation: MaxVio, `max / mean - 1` (arXiv 2408.15664); cv: standard deviation / mean; dead: share of experts
    that no token chose; entropy: of the load, divided by `log E`, so 1 is even.
    """

    max_violation: float
    cv: float
    dead: float
    entropy: float

    @classmethod
    def of(cls, counts: torch.Tensor) -> "LoadStatistics":
        """`counts [L, E]`; all zero where nothing was counted."""
        if counts.numel() == 0 or counts.sum() == 0:
            return cls(0.0, 0.0, 0.0, 0.0)
        load = counts[counts.sum(dim=1) > 0].double()
        mean = load.mean(dim=1, keepdim=True)
        share = load / load.sum(dim=1, keepdim=True)
        entropy = -torch.xlogy(share, share).sum(dim=1) / torch.tensor(float(load.shape[1])).log()
        return cls(
            max_violation=float((load.amax(dim=1, keepdim=True) / mean - 1).mean()),
            cv=float((load.std(dim=1, correction=0) / mean.squeeze(1)).mean()),
            dead=float((load == 0).double().mean()),
            entropy=float(entropy.mean()),
        )
