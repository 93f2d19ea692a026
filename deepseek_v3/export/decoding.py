"""How official tensors are made from what a checkpoint stores: plain, fused experts, or a layout of `quantization`."""

from collections.abc import Mapping
from typing import Any

import torch

from ..configuration import DeepseekV3Config
from ..modeling_deepseek_v3.checkpoint import linear_shapes
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS
from ..modeling_deepseek_v3.weight_files import TensorEntry
from .stored import Region, Stored, plain


def stored_tensors(
    entries: Mapping[str, TensorEntry],
    found: Mapping[str, Region],
    quantization: Any,
    config: DeepseekV3Config,
    mtp: bool,
    where: str,
) -> dict[str, Stored]:
    """Official name -> how it is stored. Tensors that are no part of one come under their own name.

    Args:
        mtp: whether the model has the MTP layers of the configuration, which a classifier has not.

    Raises:
        ValueError: a quantization that is not read, or parts that do not fit each other; names file and field.
    """
    left = dict(found)
    result = {} if quantization is None else _quantized(entries, left, quantization, config, mtp, where)
    result |= _fused_experts(left, config)
    return result | {name: plain(region) for name, region in left.items()}


def _quantized(
    entries: Mapping[str, TensorEntry],
    left: dict[str, Region],
    quantization: Any,
    config: DeepseekV3Config,
    mtp: bool,
    where: str,
) -> dict[str, Stored]:
    """Weights of linear layers in a layout of `quantization`; takes their parts out of `left`."""
    from ..quantization.schemes import read_layouts

    weights = linear_shapes(config, mtp)
    result: dict[str, Stored] = {}
    for module, layout in read_layouts(quantization, entries, weights, where).items():
        parts: dict[str, Region] = {}
        for suffix, header in layout.stored(weights[module]).items():
            region = left.pop(module + suffix, None)
            if region is None:
                raise ValueError(f"{where}: {module} is quantized, but there is no {module}{suffix}")
            if region.dtype not in header.dtypes or header.shape not in (None, region.shape):
                allowed = f"{' or '.join(header.dtypes)} {'' if header.shape is None else list(header.shape)}"
                found = f"{module}{suffix} is {region.dtype} {list(region.shape)}"
                raise ValueError(f"{region.file}: {found}, allowed is {allowed}")
            parts[suffix] = region
        result[f"{module}.weight"] = _dequantized(module, layout, weights[module], parts, config)
    return result


def _dequantized(
    module: str, layout: Any, matrix: tuple[int, int], parts: dict[str, Region], config: DeepseekV3Config
) -> Stored:
    """In bf16 for FP8, as official code dequantizes it; in the dtype of the scales, or of the configuration."""
    fp8 = ".weight_scale_inv" in parts
    dtype = torch.bfloat16 if fp8 else getattr(layout, "scale_dtype", None) or config.dtype or torch.bfloat16

    def decode(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(parts, tensors, strict=True))
        try:
            read = {part: layout.read(part, matrix, given.__getitem__)[None] for part in layout.parts(matrix)}
        except ValueError as error:
            raise ValueError(f"{next(iter(parts.values())).file}: {module}: {error}") from None
        return layout.dequantize(read, matrix, dtype)[0]

    return Stored(tuple(parts.values()), matrix, dtype, decode)


def _fused_experts(left: dict[str, Region], config: DeepseekV3Config) -> dict[str, Stored]:
    """Experts that `save_pretrained(save_original_format=False)` wrote as two tensors per layer."""
    result: dict[str, Stored] = {}
    experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    shapes = dict(zip(EXPERT_WEIGHTS, [(experts, 2 * width, hidden), (experts, hidden, width)], strict=True))
    for name in list(left):
        prefix, _, weight = name.rpartition(".")
        if not prefix.endswith(".experts") or left[name].shape != shapes.get(weight):
            continue  # one of another shape is reported as a tensor that does not fit
        region = left.pop(name)
        for expert in range(experts):
            matrix = region.rows(expert, 1)._replace(shape=region.shape[1:])
            parts = {"down_proj": matrix}
            if weight == EXPERT_WEIGHTS[0]:
                parts = {"gate_proj": matrix.rows(0, width), "up_proj": matrix.rows(width, width)}
            result |= {f"{prefix}.{expert}.{part}.weight": plain(piece) for part, piece in parts.items()}
    return result
