"""AdamW with fp32 master weights and its schedule, for pretraining and fine-tuning alike."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw


class MasterAdamW(torch.optim.Optimizer):
    """AdamW over fp32 copies of the parameters, which are rounded back after each step.

    An update smaller than half a unit in bf16's last place (0.4 % of the weight) would be lost on bf16 weights. fp32
    parameters are updated in place. A parameter without a gradient is left alone and takes no memory: its state is
    made at its first step, so layers may be unfrozen while the others go on.

    Args:
        groups: parameters, or torch's parameter groups, with their own `lr` and `weight_decay` where they differ.
        lr, betas, weight_decay: the defaults of the groups; `eps` is 1e-8.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def masters(self) -> list[torch.Tensor]:
        """The fp32 weights, in the order of the groups: a parameter's own tensor where it has no copy."""
        parameters = (p for group in self.param_groups for p in group["params"])
        return [self.state[p].get("master", p) if p in self.state else p for p in parameters]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            whole = [p for p in parameters if p.dtype == torch.float32]
            # one by one, so that one gradient at a time exists in fp32 as well
            for part in (whole, *([p] for p in parameters if p.dtype != torch.float32)):
                if part:
                    self._update(part, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self._state_of(p) for p in parameters]
        masters = [state.get("master", p) for p, state in zip(parameters, states, strict=True)]
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            [p.grad.float() for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
        for parameter, master in zip(parameters, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the moments and the masters to the parameters' dtype.

        Raises:
            ValueError: the state is of fp32 weights and these are not, or the reverse.
        """
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
                    state = state_dict["state"][index]
                    if ("master" in state) == (parameter.dtype == torch.float32):
                        kind = "weights with fp32 masters" if "master" in state else "float32 weights"
                        raise ValueError(
                            f"optimizer state: parameter {index} is {parameter.dtype}, and its state is of {kind}; "
                            "load the weights in the dtype they were trained in"
                        )
                    self.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in state.items()}


def warmup_cosine(warmup: int, total: int, floor: float) -> Callable[[int], float]:
    """Linear warm-up, then cosine from 1 to `floor`, reached after the last step, as a factor by step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
