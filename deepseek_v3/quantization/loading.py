"""Quantized checkpoints: checked by their headers, and read either as they are or dequantized.

`CheckpointMixin.from_pretrained` makes a `QuantizedCheckpoint` and hands transformers a dictionary of what reads like
safetensors' slices: each tensor is read when its turn comes, and the experts' go straight into their stack.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling_deepseek_v3.checkpoint import linear_shapes
from ..modeling_deepseek_v3.weight_files import TensorEntry
from .layouts import FP8Blocks, Layout, Matrix, Stored
from .models import check_experts_implementation, dequantize_, replace_weight_
from .packed_weight import PROJECTIONS, GroupedPackedWeight, PackedLinear, PackedWeight
from .schemes import read_layouts

METHOD = "deepseek_v3_packed"
# safetensors' names of the types of parts; the loader asks for them to tell floating-point tensors
_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class Packed(NamedTuple):
    """A weight of the model that stays packed: of a linear layer, or of experts (`lead` is then `(E, P)`)."""

    layout: Layout
    matrix: Matrix
    lead: tuple[int, ...] = ()


class QuantizedCheckpoint:
    """The tensors of a checkpoint with a `quantization_config`.

    Attributes:
        layouts: official name of a linear layer -> the layout of its weight, of all that are quantized.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], config: Any, where: str, mtp: bool) -> None:
        """Reads nothing but `entries`, the files' headers.

        `config` is the checkpoint's, `where` the file it is from, `mtp` whether its MTP layers are wanted.

        Raises:
            ValueError: a quantization that is not read; names file and field.
        """
        self.entries, self.config = entries, config
        given = config.quantization_config
        self.quantization = given.to_dict() if isinstance(given, QuantizationConfigMixin) else given
        self.matrices = linear_shapes(config, mtp)
        bare = "" if "embed_tokens.weight" not in entries else "model."  # a bare model is saved without that prefix
        official = {f"{bare}{name}": entry for name, entry in entries.items()}
        self.layouts = read_layouts(self.quantization, official, self.matrices, where)
        self._prefix = bare

    def stored_tensors(self) -> dict[str, dict[str, Stored]]:
        """Linear layer -> suffix -> what the header of the tensor there has to say."""
        return {name: layout.stored(self.matrices[name]) for name, layout in self.layouts.items()}

    def is_own(self, wanted: Any) -> bool:
        """Whether an argument `quantization_config` says no more than how to read this checkpoint."""
        method = _attribute(wanted, "quant_method")
        return wanted is None or method in (METHOD, self.quantization["quant_method"])

    def stays_packed(self, wanted: Any, device_map: Any) -> bool:
        """What `wanted` says of it, or else: always, but for FP8 on a CPU, which multiplies bf16 ten times faster than
        it dequantizes FP8."""
        if not self.is_own(wanted):
            return False
        dequantize = _attribute(wanted, "dequantize")
        if wanted is not None and dequantize is not None:
            return not dequantize
        return _names_gpu(device_map) or not any(isinstance(layout, FP8Blocks) for layout in self.layouts.values())

    def packed_config(self) -> dict[str, Any]:
        """For the `quantization_config` of the model's configuration: it stands for this checkpoint's."""
        return {"quant_method": METHOD, "stored": self.quantization, "weights": self.packed_weights()}

    def packed_weights(self) -> dict[str, Packed]:
        """Name in the model -> what stays packed there.

        Raises:
            ValueError: the experts of a layer are not all quantized alike.
        """
        found = {
            f"{name}.weight": Packed(layout, self.matrices[name])
            for name, layout in self.layouts.items()
            if ".experts." not in name
        }
        for prefix in dict.fromkeys(name.partition(".experts.")[0] for name in self.matrices if ".experts." in name):
            for weight, projections in PROJECTIONS.items():
                names = [
                    f"{prefix}.experts.{expert}.{projection}"
                    for expert in range(self.config.n_routed_experts)
                    for projection in projections
                ]
                layouts = {self.layouts.get(name): name for name in names}
                if len(layouts) > 1:
                    problem = "are quantized in different ways, allowed is one for all that are computed together"
                    raise ValueError(f"{' and '.join(list(layouts.values())[:2])} {problem}")
                (layout,) = layouts
                if layout is not None:
                    lead = (self.config.n_routed_experts, len(projections))
                    found[f"{prefix}.experts.{weight}"] = Packed(layout, self.matrices[names[0]], lead)
        return found

    def packed_tensors(self) -> dict[str, Any]:
        """Name in the model -> a tensor that is read when it is sliced."""
        opened = _opener()
        found = self._plain(opened)
        for name, packed in self.packed_weights().items():
            for part in packed.layout.parts(packed.matrix):
                found[f"{self._given(name)}.{part}"] = _Part(self, name, packed, part, opened)
        return found

    def dequantized_tensors(self) -> dict[str, Any]:
        """Official name -> a tensor that is read and dequantized, to fp32, when it is sliced."""
        opened = _opener()
        found = self._plain(opened)
        for name, layout in self.layouts.items():
            found[f"{self._given(name)}.weight"] = _Dequantized(self, name, layout, opened)
        return found

    def _given(self, name: str) -> str:
        """A name as the files give it."""
        return name.removeprefix(self._prefix)

    def _plain(self, opened: Callable[[Path], Any]) -> dict[str, Any]:
        parts = {
            f"{self._given(name)}{suffix}"
            for name, layout in self.layouts.items()
            for suffix in layout.stored(self.matrices[name])
        }
        return {name: opened(entry.file).get_slice(name) for name, entry in self.entries.items() if name not in parts}

    def read(self, name: str, layout: Layout, part: str, opened: Callable[[Path], Any]) -> torch.Tensor:
        """One part of a linear layer's weight. ValueError where what lies in the file does not fit; names it."""

        def tensor(suffix: str) -> torch.Tensor:
            given = f"{self._given(name)}{suffix}"
            return opened(self.entries[given].file).get_tensor(given)

        try:
            return layout.read(part, self.matrices[name], tensor)
        except ValueError as error:
            suffix = next(iter(layout.stored(self.matrices[name])))
            raise ValueError(f"{self.entries[self._given(name) + suffix].file}: {name}: {error}") from None


def _attribute(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _names_gpu(device_map: Any) -> bool:
    """Whether a `device_map` of `from_pretrained` puts something on a GPU."""
    if device_map is None:
        return torch.get_default_device().type == "cuda"
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    return torch.cuda.is_available() and any(str(device) not in ("cpu", "disk", "meta") for device in named)


def _opener() -> Callable[[Path], Any]:
    @cache  # each file is opened once per load, and closed with the last of its tensors
    def opened(file: Path) -> Any:
        return safe_open(file, framework="pt")

    return opened


class _Part:
    """A part of a packed weight; reads like a safetensors slice."""

    def __init__(
        self, checkpoint: QuantizedCheckpoint, name: str, packed: Packed, part: str, opened: Callable[[Path], Any]
    ) -> None:
        self._checkpoint, self._name, self._packed, self._part, self._opened = checkpoint, name, packed, part, opened
        self._dtype, shape = packed.layout.parts(packed.matrix)[part]
        self._shape = [*packed.lead, *shape]

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return _NAMES[self._dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        module, _, weight = self._name.rpartition(".")
        layout, _, lead = self._packed
        if not lead:
            return self._checkpoint.read(module, layout, self._part, self._opened)[index]
        stack = torch.empty(self._shape, dtype=self._dtype)
        for expert in range(lead[0]):
            for number, projection in enumerate(PROJECTIONS[weight]):
                name = f"{module}.{expert}.{projection}"
                stack[expert, number] = self._checkpoint.read(name, layout, self._part, self._opened)
        return stack[index]


class _Dequantized:
    """A weight of a linear layer; reads like a safetensors slice."""

    def __init__(
        self, checkpoint: QuantizedCheckpoint, name: str, layout: Layout, opened: Callable[[Path], Any]
    ) -> None:
        self._checkpoint, self._name, self._layout, self._opened = checkpoint, name, layout, opened
        self._matrix = checkpoint.matrices[name]

    def get_shape(self) -> list[int]:
        return list(self._matrix)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        parts = {
            part: self._checkpoint.read(self._name, self._layout, part, self._opened)[None]
            for part in self._layout.parts(self._matrix)
        }
        return self._layout.dequantize(parts, self._matrix, torch.float32).squeeze(0)[index]


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """In a loaded model's configuration it stands for the checkpoint's own, and is saved as that."""

    def __init__(
        self,
        stored: dict[str, Any] | None = None,
        weights: Mapping[str, Packed] | None = None,
        dequantize: bool | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.stored, self.weights, self.dequantize = stored or {}, weights or {}, dequantize

    def to_dict(self) -> dict[str, Any]:
        return dict(self.stored)


def packed_config(*, dequantize: bool | None = None) -> PackedConfig:
    """A `quantization_config` for `from_pretrained` of a quantized checkpoint.

    Args:
        dequantize: True: plain weights, in the dtype that the model is loaded in, that are trained and saved as any
            others. False: the weights stay in memory as the files hold them, and frozen. None: False, but True for
            FP8 on a CPU, where it is slow.
    """
    return PackedConfig(dequantize=dequantize)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts packed weights into a model's linear layers and experts, and writes them as they were read."""

    is_trainable = True  # through adapters
    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ValueError for a `device_map` that offloads: packed weights are no modules that are called, to which
        accelerate could bring them."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            allowed = "allowed with packed weights are GPUs only, or the CPU only"
            remedy = "packed_config(dequantize=True) gives weights that can be offloaded"
            raise ValueError(f"device_map: found {', '.join(sorted(places))}, {allowed}; {remedy}")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_experts_implementation(model)
        bare = not hasattr(model, model.base_model_prefix)
        dtype = model.dtype
        for name, (layout, matrix, lead) in self.quantization_config.weights.items():
            name = name.removeprefix(f"{model.base_model_prefix}.") if bare else name
            parent, _, weight = name.rpartition(".")
            module = model.get_submodule(parent)
            if lead:
                cls = GroupedPackedWeight if layout.grouped else PackedWeight
                replace_weight_(module, weight, cls(layout, matrix, dtype, lead))
            else:
                model.set_submodule(parent, PackedLinear(module, PackedWeight(layout, matrix, dtype)))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for weight in packed_weights(model).values():
            weight.requires_grad_(False)  # the loader lets every floating-point tensor train
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """Official names. An adapter is saved without its base."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        packed = packed_weights(model)
        state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in packed}
        for name, weight in packed.items():
            state |= weight.stored(name if weight.lead else name.removesuffix(".weight"))
        return model.with_mtp_copies(state), {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize_(model, dtype)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
