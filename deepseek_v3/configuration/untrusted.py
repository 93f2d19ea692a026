"""Reading a `config.json` written by someone else: what may enter, before any of it becomes an attribute."""

import json
import os
from typing import Any

from .validation import ConfigError, fail

MAX_DEPTH = 32  # official files nest 3 deep; deepcopy and the JSON encoder recurse, so depth is bounded up front

# Private keys that transformers itself has written into files or passes to the constructor. Every other key with a
# leading underscore is refused: `_attn_implementation_internal` in a file made transformers fetch and run a kernel
# from the Hub without `trust_remote_code` (CVE-2026-4372).
PRIVATE_KEYS = {"_name_or_path", "_commit_hash", "_attn_implementation", "_experts_implementation"}
# Written by transformers 4.48 to 4.56, and read by nobody since.
OBSOLETE_KEYS = {"_attn_implementation_autoset"}
# The caller chooses kernels, at load time; a file must not.
KERNEL_KEYS = ("attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation")
# Names of the base class that files do carry.
SETTABLE_KEYS = {"model_type", "num_labels", "output_attentions", "torch_dtype", "name_or_path"}


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Parse a configuration file.

    Raises:
        ConfigError: not UTF-8, not JSON, not an object, or nested too deeply; the message names the file.
    """
    try:
        with open(path, encoding="utf-8") as reader:
            content = json.load(reader)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, allowed {MAX_DEPTH} levels") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a JSON {type(content).__name__}, allowed a JSON object")
    check_depth(content, str(path))
    return content


def check_depth(content: Any, where: str) -> None:
    """Refuse nesting beyond `MAX_DEPTH`, without recursing."""
    level = [content]
    for _ in range(MAX_DEPTH):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in children for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ConfigError(f"{where}: nested too deeply, allowed {MAX_DEPTH} levels")


def check_file_content(content: dict[str, Any]) -> None:
    """Refuse what a file may not decide: the kernels that will run."""
    check_depth(content, "config.json")
    if "self" in content:  # the keys become keyword arguments of a method
        raise fail("self", content["self"], "no such key")
    for key in KERNEL_KEYS:
        if content.get(key) is not None:
            raise fail(key, content[key], f"no such key in a file; pass {key.lstrip('_')}=... to from_pretrained")


def check_extra_keys(cls: type, extra: dict[str, Any]) -> None:
    """Refuse keys outside the fields that are private, or that would replace a method or a plan of the class."""
    for key, value in extra.items():
        if key.startswith("_") and key not in PRIVATE_KEYS:
            raise fail(key, value, "no private keys in a configuration except " + ", ".join(sorted(PRIVATE_KEYS)))
        if key == "per_layer_config" and value is None:
            continue
        if not key.startswith("_") and hasattr(cls, key) and key not in SETTABLE_KEYS:
            raise fail(key, value, f"no such key: it is the name of an attribute of {cls.__name__}")
