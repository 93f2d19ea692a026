"""Tiny models with adapters, and the same ones by plain PEFT."""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.finetuning.lora import apply_lora
from tests.modeling_deepseek_v3.helpers import build, tiny_config

# PEFT looks for the keys of its patterns among modules only, and warns of those for parameters, which it does apply.
PATTERN_WARNING = "ignore:The following (rank|alpha)_pattern keys did not match"


def base(mtp: int = 0, cls: type = DeepseekV3ForCausalLM, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A small model with weights of the size that trained ones have: layer 0 dense, layers 1 and 2 with experts."""
    return build(tiny_config(num_nextn_predict_layers=mtp, **config), cls).to(dtype)


def randomized(model: nn.Module, seed: int = 3) -> Any:
    """Adapters of a size that shows; B is zero in new ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 * noise / min(parameter.shape) ** 0.5)
    return model


def adapted_pair(dtype: torch.dtype = torch.float32, mtp: int = 0, **options: Any) -> tuple[PeftModel, PeftModel]:
    """The same model and adapters, with this package's wrappers and with PEFT's own."""
    ours = apply_lora(base(mtp, dtype=dtype), mtp=bool(mtp), **options)
    theirs = get_peft_model(base(mtp, dtype=dtype), plain(ours.peft_config["default"]))
    for module in theirs.modules():
        if type(module) is ParamWrapper and hasattr(module.get_base_layer(), "count_load"):
            module.count_load = module.get_base_layer().count_load  # which the model calls while it trains
    return randomized(ours), randomized(theirs)


def plain(config: LoraConfig) -> LoraConfig:
    config = copy.deepcopy(config)
    config._custom_modules = None
    return config


class FakeQuantized(nn.Module):
    """What stands in the place of a parameter of the experts: a module that gives the weight when asked."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.halved = nn.Parameter(weight.detach() / 2, requires_grad=False)
        self.calls = 0

    @property
    def device(self) -> torch.device:
        return self.halved.device

    def dequantize(self, dtype: torch.dtype | None = None, experts: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        return 2 * (self.halved if experts is None else self.halved[experts]).to(dtype or self.dtype)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return 2 * self.halved[expert]


def quantize_experts(model: nn.Module) -> list[FakeQuantized]:
    made = []
    for module in list(model.modules()):
        if hasattr(module, "gate_up_proj"):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(module, name)
                delattr(module, name)
                made.append(FakeQuantized(weight))
                setattr(module, name, made[-1])
    return made
