"""PEFT's LoRA layers, computed on the activations and in their dtype.

PEFT's `ParamWrapper` forms `W + B A` of a whole parameter in every forward: for the experts of a layer a second copy
of all of them, which autograd keeps. Its `Linear` takes bf16 activations to the fp32 of its factors and the whole
output with them: on a CPU four times the base layer's own product. The layers here have the names, shapes and files of
PEFT's, so that adapters are exchanged with plain PEFT in both directions, and let activations pass through A and B in
the dtype that they have.

Shape legend: N tokens, E experts, K chosen per token, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..kernels.experts.lora import grouped_lora_experts, is_quantized
from ..modeling_deepseek_v3.layers import DeepseekV3Linear
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS, DeepseekV3TopkRouter, is_fused_swiglu
from ..quantization.layers import NF4Linear
from ..quantization.packed_weight import PackedLinear


def register_layers(config: LoraConfig) -> LoraConfig:
    """Let `config` build these layers where they fit, and PEFT's own elsewhere. Not part of what it saves."""
    config._register_custom_module({nn.Module: _layer})
    return config


def _layer(target: nn.Module, adapter_name: str, parameter_name: str | None = None, **kwargs) -> nn.Module | None:
    """A dispatcher of PEFT's: None leaves the target to the next one."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    cls = _module_class(base) if parameter_name is None else _parameter_class(base, parameter_name)
    if parameter_name is not None:
        kwargs["parameter_name"] = parameter_name
    return None if cls is None else cls(target, adapter_name, **kwargs)


def _module_class(base: nn.Module) -> type[LoraLayer] | None:
    if isinstance(base, NF4Linear):
        return Linear4bitLora
    return LinearLora if type(base) in (nn.Linear, DeepseekV3Linear, PackedLinear) else None


def _parameter_class(base: nn.Module, name: str) -> type[LoraLayer] | None:
    if name in EXPERT_WEIGHTS and is_fused_swiglu(base):
        return ExpertsLora
    if name == "weight" and isinstance(base, nn.Linear):
        return WeightLora
    return RouterLora if name == "weight" and isinstance(base, DeepseekV3TopkRouter) else None


def quantized_weights(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(module, name, weight) of each weight that a linear layer or experts hold as a module, quantized, instead of a
    parameter."""
    return [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module._modules.items()
        if is_quantized(weight) and hasattr(weight, "shape")  # no layer, which has a `dequantize` of its weight too
    ]


@contextmanager
def quantized_weights_as_parameters(model: nn.Module) -> Iterator[None]:
    """While PEFT looks for parameters to wrap: one without memory in the place of each quantized weight."""
    replaced = quantized_weights(model)
    for module, name, weight in replaced:
        del module._modules[name]
        empty = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    try:
        yield
    finally:
        for module, name, weight in replaced:
            del module._parameters[name]
            module._modules[name] = weight


class _Wrapper(ParamWrapper):
    def __init_subclass__(cls) -> None:
        cls.__name__ = "ParamWrapper"  # PEFT finds the wrappers of a module by this name

    def _applied(self) -> list[str]:
        """The adapters that a forward pass adds; what is merged or disabled is in the base weight or nowhere."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.lora_A]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self.get_param().dtype.is_floating_point or is_quantized(self.get_param()):
            raise ValueError(
                f"{self.parameter_name}: found a quantized weight, allowed to merge into is a plain one: "
                "dequantize the base model, load the adapter on it and merge there"
            )
        super().merge(safe_merge, adapter_names)


def add_adapter(layer: LoraLayer, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`output + scaling * B A dropout(x)` in the dtype of `output`; of factors in fp32 the gradients are fp32."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    half = output.dtype in (torch.bfloat16, torch.float16)
    x = layer.lora_dropout[name](x if half else x.to(a.weight.dtype))
    with torch.autocast(x.device.type, output.dtype, enabled=half):
        return output + b(a(x) * layer.scaling[name]).to(output.dtype)


class _InTheirDtype(LoraLayer):
    """The forward pass of PEFT's linear layers; what they have beside plain adapters is left to PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., in] -> [..., out]`."""
        special = self.disable_adapters or self.merged or self.lora_variant or any(self.lora_bias.values())
        if special or args or kwargs:
            return super().forward(x, *args, **kwargs)
        output = self.base_layer(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                output = add_adapter(self, name, x, output)
        return output


class LinearLora(_InTheirDtype, lora.Linear):
    """PEFT's `lora.Linear`."""


class Linear4bitLora(_InTheirDtype, lora.Linear4bit):
    """PEFT's `lora.Linear4bit`."""


class ExpertsLora(_Wrapper):
    """Adapters of a layer's routed experts, of one of their two weights.

    With adapters on both, one wrapper holds the other as its `base_layer`, and the outer one computes the layer with
    the factors of both. Several active adapters act as one with their ranks added. Factors are cast to the dtype of
    the base weight, as PEFT does (of the activations if the base weight is quantized). Dropout acts on the input of A
    and is the largest of the active adapters'.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`[N, H]`, `[N, K]` int64, `[N, K]` -> `[N, H]`."""
        self._check_forward_args(hidden_states, **kwargs)  # refuses `adapter_names`
        applied: dict[str, list[str]] = {}
        wrappers: dict[str, ExpertsLora] = {}
        layer: nn.Module = self
        while isinstance(layer, ExpertsLora):
            wrappers[layer.parameter_name], applied[layer.parameter_name] = layer, layer._applied()
            layer = layer.base_layer
        if not any(applied.values()):
            return layer(hidden_states, top_k_index, top_k_weights)
        gate_up, down = layer.gate_up_proj, layer.down_proj
        dtype = hidden_states.dtype if is_quantized(gate_up) else gate_up.dtype
        lora_gate_up, lora_down = (
            wrappers[name].factors(applied[name], dtype) if applied.get(name) else None for name in EXPERT_WEIGHTS
        )
        dropout = max(wrappers[name].dropout(adapters) for name, adapters in applied.items())
        hidden = hidden_states.to(dtype)
        output = grouped_lora_experts(
            hidden, top_k_index, top_k_weights, gate_up, down, lora_gate_up, lora_down, dropout
        )
        return output.to(hidden_states.dtype)

    def factors(self, adapters: list[str], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[E, r, in]` and B `[E, out, r]`, scaled, of all `adapters`."""
        a = [self.lora_A[name].weight.reshape(self.num_experts, -1, self.in_features) for name in adapters]
        b = [
            (self.lora_B[name].weight * self.scaling[name])
            .reshape(self.out_features, -1, self.num_experts)
            .permute(2, 0, 1)
            for name in adapters
        ]
        return torch.cat(a, dim=1).to(dtype), torch.cat(b, dim=2).to(dtype)

    def dropout(self, adapters: list[str]) -> float:
        layers = [self.lora_dropout[name] for name in adapters]
        return max((layer.p for layer in layers if isinstance(layer, nn.Dropout) and layer.training), default=0.0)


class WeightLora(_Wrapper):
    """Adapters of a linear layer that PEFT's configuration names by its parameter, `...gate_proj.weight`.

    Computes what PEFT's `lora.Linear` does, and like it on any linear layer, quantized ones included.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, self._param_ndim = 1, 2
        return module.in_features, module.out_features

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., in] -> [..., out]`."""
        self._check_forward_args(x, *args, **kwargs)
        applied = self._applied()
        output = self.base_layer(x, *args, **kwargs)
        for name in applied:
            output = add_adapter(self, name, x, output)
        return output


class RouterLora(_Wrapper):
    """Adapters of a router's weight. It is small and used in fp32 by the router itself, so PEFT's way serves it."""

    def count_load(self, indices: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        self.get_base_layer().count_load(indices, token_mask)
