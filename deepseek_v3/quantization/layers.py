"""Single layers into NF4, and which layers of a model those are."""

import re
from collections.abc import Iterable

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from ..modeling_deepseek_v3.layers import DeepseekV3Linear
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS, DeepseekV3Experts
from .models import replace_weight_
from .packed import BLOCK, NF4Weight, decode, decode_scales
from .packed_weight import DequantizedProduct

HEADS = ("lm_head", "score")  # the output layers of our models; embeddings, norms and router are no linear layers


def quantizable(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Name -> linear layer or routed experts of every module that NF4 takes.

    `skip`: names, or dotted parts of names, of modules that stay as they are: "kv_b_proj", "layers.0", "experts".

    Raises:
        ValueError: an entry of `skip` that names no such module.
    """
    kinds = (nn.Linear, DeepseekV3Linear, DeepseekV3Experts)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in kinds and name.split(".")[-1] not in HEADS
    }
    for part in skip:
        skipped = [name for name in found if is_part(part, name)]
        if not skipped:
            raise ValueError(f"skip: found {part!r}, allowed are names of linear layers, of experts or their parents")
        found = {name: module for name, module in found.items() if name not in skipped}
    return found


def is_part(part: str, name: str) -> bool:
    """Whether the dotted `part` lies within the dotted `name`."""
    return re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) is not None


def check_quantized(model: nn.Module, skip: Iterable[str] = ()) -> None:
    """ValueError naming the weights outside of `skip` that are not in NF4, as fused experts are with other loaders."""
    left = []
    for name, module in model.named_modules():
        if any(is_part(part, name) for part in skip):
            continue
        if isinstance(module, DeepseekV3Experts):
            left += [f"{name}.{w}" for w in EXPERT_WEIGHTS if not isinstance(getattr(module, w), NF4Weight)]
        elif isinstance(module, NF4Linear) and not module.weight.bnb_quantized:
            left.append(f"{name}.weight")
    if left:
        raise ValueError(f"{len(left)} weights are not in NF4, though the configuration asks for it: {left[:4]}")


class NF4Linear(Linear4bit):
    """bitsandbytes' 4-bit layer, for the place of a linear layer `source`; it computes in the dtype of that weight.

    On CPUs the product is our own. bitsandbytes' is wrong where the width is no multiple of 64 (see `packed.decode`),
    and with AVX512-BF16 its first evaluation rounds the scales to bf16, in place and for good.
    """

    def __init__(self, source: nn.Linear, double_quant: bool) -> None:
        """Without memory for the weight, which is still to come (`pack_linear_`)."""
        with torch.device("meta"):
            super().__init__(
                source.in_features,
                source.out_features,
                bias=False,
                compute_dtype=source.weight.dtype,
                compress_statistics=double_quant,
                quant_type="nf4",
            )
        self.bias = source.bias
        self.source_cls = type(source)
        self.requires_grad_(False).train(source.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        output = DequantizedProduct.apply(x.to(self.compute_dtype), self)
        return (output if self.bias is None else output + self.bias).to(x.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[out, in]`, newly made."""
        state = self.weight.quant_state
        absmax = state.absmax[None]
        if state.nested:
            absmax = decode_scales(absmax, state.state2.absmax[None], state.state2.code, state.offset[None])
        return decode(self.weight.data.view(1, -1), absmax, state.shape, dtype).squeeze(0)


def pack_linear_(layer: NF4Linear, weight: torch.Tensor) -> None:
    """Quantize `weight` into a new `NF4Linear`, on the device that it is on."""
    options = {"blocksize": BLOCK, "compress_statistics": layer.weight.compress_statistics, "quant_type": "nf4"}
    layer.weight = Params4bit(weight.detach(), requires_grad=False, module=layer, **options).to(weight.device)


def pack_experts_(experts: DeepseekV3Experts, name: str, weight: torch.Tensor, double_quant: bool) -> None:
    """Put `weight`, quantized, in the place of the experts' parameter `name`."""
    replace_weight_(experts, name, NF4Weight.quantize(weight, double_quant))
