"""AdamW with fp32 master weights, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .recipe import Recipe


class MasterAdamW:
    """AdamW over fp32 copies of the parameters, which are rounded back after each step.

    An update smaller than half a unit in bf16's last place (0.4 % of the weight) would be lost on bf16 weights. fp32
    parameters are updated in place. Matrices decay; norms and other vectors do not.

    Attributes:
        inner: the `torch.optim.AdamW` that does the work: schedules and step hooks attach to it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (recipe.beta1, recipe.beta2)
        self.inner = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
        self.inner.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Moments and master weights, for bitwise resumption."""
        return {"adamw": self.inner.state_dict(), "masters": [m.detach() for m in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["adamw"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over `warmup_steps`, then cosine to `min_lr_ratio` of the peak at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * cosine)
