"""What a fine-tune changed: which experts moved and how far, from the adapters or from two sets of weights."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS, DeepseekV3Experts
from .build import unwrapped


@torch.no_grad()
def expert_movement(model: nn.Module, before: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """How far each routed expert moved, by layer: `||dW_e|| / ||W_e||` over both of its matrices, fp32 `[E]` on CPU.

    With adapters `dW_e` is their product, of which no matrix of the weight's size is made:
    `||B A||^2 = <B^T B, A A^T>`. Without, `before` holds the weights at the start, by parameter name. Layers whose
    experts cannot have moved (no adapter, not in `before`) are left out.
    """
    movement = {}
    for name, experts in unwrapped(model).named_modules():
        if not isinstance(experts, DeepseekV3Experts):
            continue
        squares = []
        adapters = _adapters_of(model, experts)
        for parameter in EXPERT_WEIGHTS:
            weight = getattr(experts, parameter)
            if parameter in adapters:
                squares.append((_square(weight), _product_square(adapters[parameter], weight.shape[0])))
            elif before is not None and f"{name}.{parameter}" in before:
                start = before[f"{name}.{parameter}"].float()
                squares.append((_square(start), (weight.detach().float().cpu() - start).pow(2).sum((1, 2))))
        if squares:
            whole, moved = (torch.stack(part).sum(0) for part in zip(*squares, strict=True))
            layer = name.split(".mlp.experts")[0].removeprefix("model.")
            movement[layer] = (moved / whole).sqrt()
    return movement


def _adapters_of(model: nn.Module, experts: nn.Module) -> dict[str, LoraLayer]:
    """The wrappers around `experts`, by the parameter that they adapt."""
    return {
        module.parameter_name: module
        for module in model.modules()
        if isinstance(module, LoraLayer) and hasattr(module, "parameter_name") and module.get_base_layer() is experts
    }


def _square(weight: Any) -> torch.Tensor:
    """Squared Frobenius norm of each expert's matrix, `[E]`."""
    dense = weight.detach() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
    return torch.stack([expert.float().pow(2).sum() for expert in dense]).cpu()


def _product_square(wrapper: LoraLayer, num_experts: int) -> torch.Tensor:
    """Squared norm of each expert's `scaling * B_e A_e`, summed over the active adapters, `[E]`."""
    a_parts, b_parts = [], []
    for adapter in wrapper.active_adapters:
        a = wrapper.lora_A[adapter].weight.float()
        b = wrapper.lora_B[adapter].weight.float() * wrapper.scaling[adapter]
        a_parts.append(a.reshape(num_experts, -1, a.shape[1]))  # expert-major [E, r, in]
        b_parts.append(b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1))  # rank-major [E, out, r]
    a, b = torch.cat(a_parts, 1), torch.cat(b_parts, 2)
    return ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2)).cpu()


def summarize_movement(movement: Mapping[str, torch.Tensor], top: int = 5) -> dict[str, Any]:
    """For the record: per layer mean, max and the experts that moved most; and the share of the movement's square that
    the most moved tenth of all experts holds (0.1 is even)."""
    if not movement:
        return {}
    layers = {}
    for layer, moved in movement.items():
        order = moved.argsort(descending=True)[:top].tolist()
        most = [[expert, round(float(moved[expert]), 6)] for expert in order]
        layers[layer] = {"mean": float(moved.mean()), "max": float(moved.max()), "most": most}
    squares = torch.cat(list(movement.values())).pow(2).sort(descending=True).values
    tenth = max(1, len(squares) // 10)
    share = float(squares[:tenth].sum() / squares.sum()) if squares.sum() > 0 else 0.0
    return {"layers": layers, "share_of_top_tenth": share}
