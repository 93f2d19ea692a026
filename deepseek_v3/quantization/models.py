"""What of a model is quantized, how much that is, and undoing it; for every format."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels.experts.lora import is_quantized
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS, DeepseekV3Experts

EXPERTS_IMPLEMENTATIONS = ("deepseek_v3", "eager")  # those that read a quantized weight


def check_experts_implementation(model: PreTrainedModel) -> None:
    """ValueError for an experts implementation that wants the weights as a tensor."""
    implementation = model.config._experts_implementation
    if implementation not in EXPERTS_IMPLEMENTATIONS:
        allowed = " and ".join(map(repr, EXPERTS_IMPLEMENTATIONS))
        raise ValueError(
            f"experts_implementation: found {implementation!r}, allowed with quantized weights are {allowed}"
        )


def replace_weight_(experts: DeepseekV3Experts, name: str, weight: nn.Module | nn.Parameter) -> None:
    """Put `weight` in the place of the experts' weight `name`, be it a parameter or a module."""
    delattr(experts, name)  # a module is not assigned over a parameter
    setattr(experts, name, weight)
    for each in EXPERT_WEIGHTS:  # in the parameters' order: PEFT's names for adapters of both depend on it
        if each in experts._modules:
            experts._modules[each] = experts._modules.pop(each)


@torch.no_grad()
def dequantize_(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Back to plain parameters, in place, each with the value that the quantized weight stands for.

    `dtype` is that of the whole model afterwards, by default the one it has. Raises ValueError for a model that this
    package has not quantized or loaded, or that has an adapter in it (see `finetuning.quantized_merge`).
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if hasattr(module, "source_cls")}
    experts = [module for module in modules.values() if isinstance(module, DeepseekV3Experts)]
    if not layers and not any(is_quantized(getattr(each, name)) for each in experts for name in EXPERT_WEIGHTS):
        raise ValueError(f"model: found a {type(model).__name__} that is not quantized, allowed is one that is")
    for name in modules:
        if name.endswith(".base_layer"):
            raise ValueError(f"model: found an adapter around {name.removesuffix('.base_layer')}, merge it instead")
    for name, layer in layers.items():
        model.set_submodule(name, _plain_linear(layer, dtype))
    for each in experts:
        for name in EXPERT_WEIGHTS:
            if is_quantized(packed := getattr(each, name)):
                replace_weight_(each, name, nn.Parameter(packed.dequantize(dtype)))
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model if dtype is None else model.to(dtype)


def _plain_linear(layer: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    """The layer that a quantized one stands for, by default in the dtype that it computes in."""
    with torch.device("meta"):
        plain = layer.source_cls(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(layer.dequantize(dtype or layer.compute_dtype))
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.data)
    return plain.train(layer.training)


def quantized_fraction(model: nn.Module) -> float:
    """The share of the model's parameters that are quantized, 0 to 1; each counts as one, however many bits it has.

    Parameters of an adapter count as the model's.
    """
    weights = list(_weights(model))
    return sum(count for count, _, quantized in weights if quantized) / sum(count for count, _, _ in weights)


def bytes_per_parameter(model: nn.Module) -> float:
    """Bytes of all parameters, scales included, over the number of parameters that the model has unquantized."""
    weights = list(_weights(model))
    return sum(size for _, size, _ in weights) / sum(count for count, _, _ in weights)


def _weights(model: nn.Module) -> Iterator[tuple[int, int, bool]]:
    """(elements, bytes, whether quantized) of each weight."""
    parts: set[nn.Parameter] = set()
    for module in model.modules():
        if is_quantized(module) and hasattr(module, "shape"):  # no layer around one
            parts.update(module.parameters())
            yield module.shape.numel(), sum(part.nbytes for part in module.parameters()), True
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)  # of bitsandbytes' Params4bit
        if state is not None:
            scales = [state.absmax] + ([state.state2.absmax, state.state2.code, state.offset] if state.nested else [])
            yield state.shape.numel(), weight.nbytes + sum(scale.nbytes for scale in scales), True
        elif weight not in parts:
            yield weight.numel(), weight.nbytes, False
