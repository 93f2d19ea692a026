"""What the compressed-tensors formats share: which weights are quantized, and how config.json says so."""

import re
from collections.abc import Collection

from .source import CLASSIFIERS, Source
from .steps import LINEAR

ROUTED = re.compile(r".*\.mlp\.experts\.\d+\..*")
GATE = ".mlp.gate.weight"


def chosen_weights(source: Source, targets: str) -> list[str]:
    """Official names of the weights to quantize, in order; MTP layers are left as they are.

    `experts`: the routed experts. `linears`: all linear layers of attention and MLPs but `kv_b_proj`, which servers
    take apart when they absorb it. Either way `q_a_proj` and `kv_a_proj_with_mqa` (and `gate_proj` and `up_proj`),
    which servers merge, have one scheme.
    """
    linears = [name for name in source.names if LINEAR.fullmatch(name) and not _is_mtp(source, name)]
    if targets == "experts":
        return [name for name in linears if ROUTED.fullmatch(name)]
    return [name for name in linears if ".kv_b_proj." not in name]


def head_module(source: Source) -> str:
    """The output layer, which is never quantized; a tied one has no tensor of its own."""
    return "score" if source.config.architectures[0] in CLASSIFIERS.values() else "lm_head"


def ignored_modules(source: Source, chosen: Collection[str]) -> list[str]:
    """Names for `ignore`: every linear layer that stays as it is, every router and the head by name, MTP layers by
    pattern."""
    chosen = set(chosen)
    names = [
        name.removesuffix(".weight")
        for name in source.names
        if (LINEAR.fullmatch(name) or name.endswith(GATE)) and name not in chosen and not _is_mtp(source, name)
    ]
    first = source.config.num_hidden_layers
    depths = source.config.num_nextn_predict_layers if any(_is_mtp(source, name) for name in source.names) else 0
    mtp = [rf"re:model\.layers\.{first + depth}\..*" for depth in range(depths)]
    return [head_module(source), *names, *mtp]


def quantization_config(
    source: Source, chosen: Collection[str], format: str, weights: dict, inputs: dict | None
) -> dict:
    """`quantization_config` of config.json as compressed-tensors defines it.

    Args:
        format: `pack-quantized` or `int-quantized`.
        weights, inputs: `QuantizationArgs` of weights and activations.
    """
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": format}},
        "ignore": ignored_modules(source, chosen),
        "kv_cache_scheme": None,
    }


def _is_mtp(source: Source, name: str) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= source.config.num_hidden_layers
