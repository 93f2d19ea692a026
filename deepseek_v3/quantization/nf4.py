"""Models in NF4: a quantization method of transformers' registry, and the same for a model that is in memory.

`AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4_config())` replaces the linear layers before the
files are read and quantizes each weight as soon as it is read, so that of the model in full precision no more than a
layer's experts are in memory at a time.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling_deepseek_v3.moe import DeepseekV3Experts
from .layers import EXPERT_WEIGHTS, NF4Linear, check_quantized, pack_experts_, pack_linear_, quantizable
from .models import check_experts_implementation, dequantize_

METHOD = "deepseek_v3_nf4"
logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """What `nf4_config` returns."""

    llm_int8_enable_fp32_cpu_offload = False  # read by the class that the quantizer derives from

    def __init__(self, double_quant: bool = True, skip: Iterable[str] = (), quant_method: str = METHOD) -> None:
        if isinstance(skip, str):
            raise ValueError(f"skip: found the string {skip!r}, allowed is a list of names")
        self.quant_method = quant_method
        self.double_quant = double_quant
        self.skip = list(skip)


def nf4_config(*, double_quant: bool = True, skip: Iterable[str] = ()) -> NF4Config:
    """A `quantization_config` for `from_pretrained`: NF4 in blocks of 64 for all linear layers and routed experts.

    Embeddings, norms, routers and the output layers (`lm_head`, `score`) stay as they are. Products are computed in
    the dtype that the model is loaded in (`dtype=`). A model in NF4 is trained through adapters, and is not saved.

    Args:
        double_quant: quantize the scales too (0.52 bytes per weight instead of 0.56).
        skip: modules to leave as they are, by name or dotted part of the name: "kv_b_proj", "layers.0", "experts".
    """
    return NF4Config(double_quant, skip)


@register_quantizer(METHOD)
class NF4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit loading, for this model's own linear layers and for the fused experts, both of which it
    leaves as they are."""

    serialized_names: dict[str, list[str]] = {}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, DeepseekV3Experts):
            return param_name.rpartition(".")[0] in self._experts
        return isinstance(module, NF4Linear) and name == "weight"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_experts_implementation(model)
        modules = quantizable(model, self.quantization_config.skip)
        self._experts = {name for name, module in modules.items() if isinstance(module, DeepseekV3Experts)}
        for name in modules.keys() - self._experts:
            model.set_submodule(name, NF4Linear(modules[name], self.quantization_config.double_quant))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_quantized(model, self.quantization_config.skip)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.double_quant)

    def get_load_operations(self) -> dict:
        return {}

    def is_serializable(self) -> bool:
        """False, and says why; adapters are saved all the same."""
        logger.warning(
            "A model in NF4 is not saved, as no reader of DeepSeek-V3 checkpoints would take it: save the adapter "
            "(PeftModel.save_pretrained), or merge or dequantize the model first."
        )
        return False

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize_(model, dtype)


class _Quantize(ConversionOps):
    """The last step of reading a weight. Puts it into the model itself, as what the experts have is no tensor."""

    def __init__(self, double_quant: bool) -> None:
        self.double_quant = double_quant

    def convert(self, input_dict, *, model, missing_keys, **kwargs):
        for name, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            module, attribute = get_module_from_name(model, name)
            if isinstance(module, NF4Linear):
                pack_linear_(module, weight)
            else:
                pack_experts_(module, attribute, weight, self.double_quant)
            module._is_hf_initialized = True  # or transformers would draw random weights for it
            missing_keys.discard(name)
        return {}


@torch.no_grad()
def quantize_nf4_(model: PreTrainedModel, *, double_quant: bool = True, skip: Iterable[str] = ()) -> PreTrainedModel:
    """Quantize a model in memory, in place: the model, bit for bit, that `from_pretrained` makes of its checkpoint.

    The arguments are those of `nf4_config`. Raises ValueError for a model that is quantized already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        found = model.hf_quantizer.quantization_config.quant_method
        raise ValueError(f"model: found one that is quantized already ({found}), allowed is one that is not")
    quantizer = NF4Quantizer(nf4_config(double_quant=double_quant, skip=skip), pre_quantized=False)
    check_experts_implementation(model)
    for name, module in quantizable(model, quantizer.quantization_config.skip).items():
        if isinstance(module, DeepseekV3Experts):
            for weight in EXPERT_WEIGHTS:
                pack_experts_(module, weight, getattr(module, weight), double_quant)
        else:
            layer = NF4Linear(module, double_quant)
            pack_linear_(layer, module.weight)
            model.set_submodule(name, layer)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD
    quantizer.postprocess_model(model)
    return model
