"""`adapter_config.json` of a LoRA adapter written by someone else.

PEFT takes its fields as they come: some are regular expressions, some import modules, some build other layers, and the
rank is allocated before a tensor is read. Here each field is checked, and the rest must be switched off.
"""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from .patterns import is_name, pattern_problem
from .untrusted import read_json
from .validation import ConfigError, fail, is_number

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1024
MAX_NAMES = 2**14  # ten times the modules of DeepSeek-V3 that an adapter can have
MAX_PATTERNS = 64
MAX_ALPHA = 1e6
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", None)
LIBRARIES = ("transformers", "deepseek_v3")


def read_adapter_config(folder: str | PathLike) -> dict[str, Any]:
    """The fields of `folder`/adapter_config.json that `peft.LoraConfig` is to be called with.

    Fields without meaning for a model that is already there are left out, among them `auto_mapping`, which names a
    module to import.

    Raises:
        ValueError: names the file, the field, what was found and what is allowed.
        OSError: there is no such file.
    """
    path = Path(folder, ADAPTER_CONFIG)
    content = read_json(path)
    try:
        return _checked(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    if content.get("peft_type") != "LORA":
        raise fail("peft_type", content.get("peft_type"), "'LORA'")
    for field, value in content.items():
        if field in _CHECKS:
            test, allowed = _CHECKS[field]
            if not test(value):
                raise fail(field, value, allowed)
        if field in _PATTERNS:
            _check_patterns(field, value)
        elif field not in _CHECKS and field not in _WITHOUT_EFFECT and value not in (None, False, [], {}):
            raise fail(field, value, "nothing: it is not supported here; load the adapter with PEFT if you trust it")
    if not content.get("target_modules") and not content.get("target_parameters"):
        raise fail("target_modules", content.get("target_modules"), "names of modules, or target_parameters")
    return {field: value for field, value in content.items() if field in _KEPT and value is not None}


def _check_patterns(field: str, value: Any) -> None:
    """Names and regular expressions: a string, a list of them, or an object with them as keys."""
    values = [value] if isinstance(value, str) else value
    if value is None:
        return
    kind = dict if field in _NUMBERS else list
    if not isinstance(values, kind) or len(values) > MAX_NAMES or not all(isinstance(v, str) for v in values):
        raise fail(field, value, f"at most {MAX_NAMES} names or patterns")
    if sum(not is_name(pattern) for pattern in values) > MAX_PATTERNS:
        raise fail(field, value, f"at most {MAX_PATTERNS} patterns; the others must be names")
    for pattern in values:
        if problem := pattern_problem(pattern):
            raise fail(field, pattern, f"no pattern with {problem}")


def _number(low: float, high: float, integer: bool = False) -> tuple[Callable[[Any], bool], str]:
    kind = int if integer else (int, float)
    noun = "an integer" if integer else "a number"
    return (lambda value: is_number(value, kind) and low <= value <= high), f"{noun} from {low:g} to {high:g}"


def _choice(*values: Any) -> tuple[Callable[[Any], bool], str]:
    names = ", ".join("null" if value is None else repr(value) for value in values)
    return (lambda value: any(value is choice or value == choice for choice in values)), f"one of {names}"


def _each(test: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and test[0](v) for k, v in value.items())

    return check, f"an object whose values are {test[1]}"


def _is_layers(value: Any) -> bool:
    values = [value] if not isinstance(value, list) else value
    return value is None or len(values) <= 2048 and all(is_number(v, int) and 0 <= v < 2048 for v in values)


def _is_mapping(value: Any) -> bool:
    """Only `AutoPeftModel` of PEFT reads it, and imports what it names."""
    if not isinstance(value, dict):
        return value is None
    library = value.get("parent_library")
    return isinstance(library, str) and library.split(".")[0] in LIBRARIES


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str) and len(value) <= 4096


_RANK, _ALPHA = _number(1, MAX_RANK, integer=True), _number(0, MAX_ALPHA)
_BOOLEAN = _choice(True, False)
_TEXT = _is_text, "a string or null"
# Field -> test and what is allowed.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": _choice("LORA"),
    "task_type": _choice(*TASK_TYPES),
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": _number(0, 1),
    "bias": _choice("none"),
    "use_rslora": _BOOLEAN,
    "inference_mode": _BOOLEAN,
    # the others change the weights of the base, some by a decomposition of each
    "init_lora_weights": _choice(True, False, "gaussian", "orthogonal"),
    "layers_to_transform": (_is_layers, "layer numbers from 0 to 2047, or null"),
    "auto_mapping": (_is_mapping, f"null, or an object whose parent_library is of {' or '.join(LIBRARIES)}"),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "rank_pattern": _each(_RANK),
    "alpha_pattern": _each(_ALPHA),
    "target_parameters": (lambda value: value is None or isinstance(value, list), "a list of names"),
}
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern")
_NUMBERS = ("rank_pattern", "alpha_pattern")  # their keys are patterns
_PATTERNS = (*_NAMES, *_NUMBERS)
_WITHOUT_EFFECT = ("peft_version", "megatron_core", "qalora_group_size", "runtime_config")
_KEPT = {*_CHECKS, *_PATTERNS} - {"peft_type", "auto_mapping"}
