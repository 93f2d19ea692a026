"""What a checkpoint's `quantization_config` says, compared with the tensors that its files hold.

The files decide which weights are quantized; where the configuration says it too, both have to agree.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..configuration.patterns import pattern_problem
from ..kernels.int4 import GROUP_SIZES
from ..modeling_deepseek_v3.weight_files import TensorEntry
from .layouts import DTYPES, FP8Blocks, Int8Channels, Layout, Matrix, PackedInt4

Entries = Mapping[str, TensorEntry]
_MAX_STATE_BYTES = 4096  # of bitsandbytes' record of a weight; it has about 160


def read_layouts(quantization: Any, entries: Entries, weights: Mapping[str, Matrix], where: str) -> dict[str, Layout]:
    """Name of a linear layer -> the layout of its weight, of all that are quantized.

    Shapes are left to whoever compares the headers with `Layout.stored`.

    Args:
        quantization: the checkpoint's `quantization_config`.
        entries: its headers, under official names.
        weights: official name, without ".weight", and shape of every weight of a linear layer, router excepted.
        where: the file that `quantization` is from.

    Raises:
        ValueError: a method, scheme or pattern that is not read, or one that the files contradict; names file and
            field.
    """
    if not isinstance(quantization, dict):
        raise ValueError(f"{where}: quantization_config is {quantization!r:.100}, allowed is an object")
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        allowed = ", ".join(METHODS)
        raise ValueError(f"{where}: quantization_config.quant_method is {method!r:.100}, allowed are {allowed}")
    return METHODS[method](quantization, entries, weights, where)


def _field(where: str, quantization: Mapping[str, Any], name: str, allowed: tuple, prefix: str = "") -> Any:
    """The value of a field if it is one of `allowed`, the first of which stands for an absent one."""
    value = quantization.get(name, allowed[0])
    if not any(type(value) is type(each) and value == each for each in allowed):
        options = " and ".join(map(repr, allowed))
        raise ValueError(f"{where}: quantization_config.{prefix}{name} is {value!r:.200}, allowed are {options}")
    return value


# --- FP8 -----------------------------------------------------------------------------------------------------------


def _fp8(quantization: dict, entries: Entries, weights: Mapping[str, Matrix], where: str) -> dict[str, Layout]:
    _field(where, quantization, "fmt", ("e4m3",))
    _field(where, quantization, "activation_scheme", ("dynamic",))
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        problem = f"quantization_config.weight_block_size is {block!r:.100}, allowed are two positive sizes"
        raise ValueError(f"{where}: {problem}")
    layouts: dict[str, Layout] = {}
    for name in weights:
        weight, scale = entries.get(f"{name}.weight"), entries.get(f"{name}.weight_scale_inv")
        if weight is not None and (weight.dtype == "F8_E4M3") != (scale is not None):
            found = f"{weight.dtype} {'with' if scale else 'without'} {name}.weight_scale_inv"
            raise ValueError(f"{weight.file}: {name}.weight is {found}")
        if scale is not None:
            layouts[name] = FP8Blocks((block[0], block[1]), _scale_dtype(scale, f"{name}.weight_scale_inv"))
    return layouts


def _scale_dtype(scale: TensorEntry, name: str) -> Any:
    if scale.dtype not in DTYPES:
        raise ValueError(f"{scale.file}: {name} is {scale.dtype}, allowed are {', '.join(DTYPES)}")
    return DTYPES[scale.dtype]


# --- compressed-tensors --------------------------------------------------------------------------------------------

_FORMATS = {4: "pack-quantized", 8: "int-quantized"}
_WEIGHTS = {"type": ("int",), "symmetric": (True,), "dynamic": (False, None), "block_structure": (None,)}
_INPUTS = {"num_bits": (8,), "type": ("int",), "symmetric": (True,), "dynamic": (True,), "strategy": ("token",)}


def _compressed_tensors(
    quantization: dict, entries: Entries, weights: Mapping[str, Matrix], where: str
) -> dict[str, Layout]:
    _field(where, quantization, "quantization_status", ("compressed",))
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        _field(where, quantization, name, (None, {}))
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{where}: quantization_config.config_groups is {groups!r:.100}, allowed is an object")
    file_format = _field(where, quantization, "format", (None, *_FORMATS.values(), "mixed-precision"))
    schemes = []
    for key, group in groups.items():
        field = f"config_groups.{key:.100}"
        if not isinstance(group, dict):
            raise ValueError(f"{where}: quantization_config.{field} is {group!r:.100}, allowed is an object")
        targets = _Names(group.get("targets"), f"{where}: quantization_config.{field}.targets", ("Linear",))
        schemes.append((targets, _group(group, file_format, f"{field}.", where), field))
    ignored = _Names(quantization.get("ignore") or [], f"{where}: quantization_config.ignore", ())

    layouts: dict[str, Layout] = {}
    for name in weights:
        # a name outranks a pattern, and a pattern the class of all linear layers
        match = max(schemes, key=lambda scheme: scheme[0].rank(name))
        quantized = match[0].rank(name) > 0 and not ignored.rank(name)
        bits, dynamic, group_size = match[1]
        weight = f"{name}.weight_packed" if bits == 4 else f"{name}.weight"
        if not quantized:
            _check_plain(entries, name, where)
            continue
        scale = entries.get(f"{name}.weight_scale")
        if f"{name}.weight_zero_point" in entries:
            found = f"found {name}.weight_zero_point, allowed are symmetric weights"
            raise ValueError(f"{entries[f'{name}.weight_zero_point'].file}: {found}")
        if scale is None or weight not in entries:
            missing = [part for part in (weight, f"{name}.weight_scale") if part not in entries]
            problem = f"quantization_config.{match[2]} quantizes {name}, which 'ignore' does not name"
            raise ValueError(f"{where}: {problem}, but there is no {' and no '.join(missing)}")
        dtype = _scale_dtype(scale, f"{name}.weight_scale")
        if bits == 4:
            if weights[name][1] % group_size:
                size = f"group_size is {group_size}, no divisor of the {weights[name][1]} inputs of {name}"
                raise ValueError(f"{where}: quantization_config.{match[2]}.weights.{size}")
            layouts[name] = PackedInt4(group_size, dtype)
        else:
            layouts[name] = Int8Channels(dynamic, dtype)
    return layouts


def _check_plain(entries: Entries, name: str, where: str) -> None:
    for suffix in (".weight_packed", ".weight_scale"):
        if (entry := entries.get(f"{name}{suffix}")) is not None:
            problem = "which quantization_config quantizes with no group, or names in 'ignore'"
            raise ValueError(f"{entry.file}: found {name}{suffix}, {problem} ({where})")


def _group(group: dict, file_format: str | None, prefix: str, where: str) -> tuple[int, bool, int]:
    """Bits, whether activations are quantized, and the group size (of 4 bits)."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise ValueError(f"{where}: quantization_config.{prefix}weights is {weights!r:.100}, allowed is an object")
    _field(where, group, "output_activations", (None,), prefix)
    bits = _field(where, {"num_bits": None, **weights}, "num_bits", (4, 8), f"{prefix}weights.")
    for name, allowed in _WEIGHTS.items():
        _field(where, weights, name, allowed, f"{prefix}weights.")
    strategy = {"strategy": None, **weights}
    _field(where, strategy, "strategy", ("group",) if bits == 4 else ("channel",), f"{prefix}weights.")
    _field(where, weights, "actorder", (None, "weight", "static"), f"{prefix}weights.")  # all leave columns in order
    formats = (_FORMATS[bits],) if file_format == "mixed-precision" else (_FORMATS[bits], None)
    _field(where, group, "format", formats, prefix)
    if file_format not in (_FORMATS[bits], "mixed-precision", None):
        problem = f"quantization_config.format is {file_format!r}, but {prefix}weights.num_bits is {bits}"
        raise ValueError(f"{where}: {problem}, whose format is {_FORMATS[bits]!r}")
    if bits == 4:
        _field(where, group, "input_activations", (None,), prefix)
        size = {"group_size": None, **weights}
        return bits, False, _field(where, size, "group_size", GROUP_SIZES, f"{prefix}weights.")
    if inputs is None:
        return bits, False, 0
    if not isinstance(inputs, dict):
        problem = f"quantization_config.{prefix}input_activations is {inputs!r:.100}"
        raise ValueError(f"{where}: {problem}, allowed are null and an object")
    for name, allowed in _INPUTS.items():
        _field(where, {name: None, **inputs}, name, allowed, f"{prefix}input_activations.")
    return bits, True, 0


class _Names:
    """compressed-tensors' lists of targets: names of modules, "re:" and a regular expression, and names of classes."""

    def __init__(self, entries: Any, field: str, classes: tuple[str, ...]) -> None:
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{field} is {entries!r:.200}, allowed is a list of names and of 're:' patterns")
        self.everything = any(entry in classes for entry in entries)
        self.names = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self.patterns = [_pattern(entry, field) for entry in entries if entry.startswith("re:")]

    def rank(self, name: str) -> int:
        """3 for a name, 2 for a pattern, 1 for the class, 0 for none."""
        if name in self.names:
            return 3
        if any(pattern.match(name) for pattern in self.patterns):
            return 2
        return int(self.everything)


def _pattern(entry: str, field: str) -> re.Pattern[str]:
    if problem := pattern_problem(expression := entry.removeprefix("re:")):
        raise ValueError(f"{field}: found {entry:.200}, allowed is no pattern with {problem}")
    return re.compile(expression)


# --- bitsandbytes --------------------------------------------------------------------------------------------------


def _bitsandbytes(
    quantization: dict, entries: Entries, weights: Mapping[str, Matrix], where: str
) -> dict[str, Layout]:
    try:
        from .bitsandbytes_layouts import LLMInt8Rows, NF4Blocks
    except ModuleNotFoundError as error:
        problem = "quantization_config.quant_method is 'bitsandbytes', which needs a library that is not installed"
        raise ValueError(f"{where}: {problem}: pip install {error.name}") from error

    four, eight = (_field(where, quantization, name, (False, True, None)) for name in ("load_in_4bit", "load_in_8bit"))
    if bool(four) == bool(eight):
        found = f"load_in_4bit is {four} and load_in_8bit is {eight}"
        raise ValueError(f"{where}: quantization_config.{found}, allowed is True for one of them")
    if eight:
        _field(where, quantization, "llm_int8_has_fp16_weight", (False,))
        return {name: LLMInt8Rows() for name in weights if f"{name}.SCB" in entries}

    _field(where, {"bnb_4bit_quant_type": None, **quantization}, "bnb_4bit_quant_type", ("nf4",))
    _field(where, quantization, "bnb_4bit_quant_storage", ("uint8",))
    double = _field(where, quantization, "bnb_4bit_use_double_quant", (False, True))
    state = ".weight.quant_state.bitsandbytes__nf4"
    sizes = [sum(entry.shape) for name in weights if (entry := entries.get(name + state)) is not None]
    if (size := max(sizes, default=0)) > _MAX_STATE_BYTES:
        raise ValueError(f"{where}: a weight's {state[8:]} has {size} bytes, allowed are {_MAX_STATE_BYTES}")
    layout = NF4Blocks(double, size)
    return {name: layout for name in weights if f"{name}.weight.absmax" in entries}


METHODS: dict[str, Callable[[dict, Entries, Mapping[str, Matrix], str], dict[str, Layout]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
