"""Reading a `config.json` written by someone else: what may enter, before any of it becomes an attribute."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from .validation import ConfigError, fail

MAX_BYTES = 2**24  # of a file; 131,072 label names fit
MAX_ITEMS = 2**18  # values in it; millions of empty lists take Python many seconds and half a gigabyte
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
        ConfigError: too long, not UTF-8, not JSON, not an object, or nested too deeply; the message names the file.
    """
    with open(path, "rb") as reader:
        raw = reader.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: found over {MAX_BYTES} bytes, allowed {MAX_BYTES}")
    if (items := sum(map(raw.count, (b",", b"[", b"{")))) > MAX_ITEMS:
        raise ConfigError(f"{path}: found {items} commas and brackets, allowed {MAX_ITEMS}")
    try:
        content = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, allowed {MAX_DEPTH} levels") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a JSON {type(content).__name__}, allowed a JSON object")
    check_depth(content, str(path))
    return content


@contextmanager
def naming_file(name: str | os.PathLike | None) -> Iterator[None]:
    """Put the file, of a folder its config.json, or the repository in front of a `ConfigError` that lacks it."""
    try:
        yield
    except ConfigError as error:
        if name is None or str(name) in str(error):
            raise
        where = os.path.join(name, "config.json") if os.path.isdir(name) else name
        raise ConfigError(f"{where}: {error}") from error.__cause__


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


def check_generation_file(path: str | os.PathLike) -> None:
    """Check a `generation_config.json` before `GenerationConfig.from_pretrained` reads it.

    Raises:
        ConfigError: not a JSON object, the name of a method as a key, or an object that the caller alone chooses; the
            message names the file.
    """
    for key, value in read_json(path).items():
        if key == "self" or callable(getattr(GenerationConfig, key, None)):
            raise ConfigError(f"{path}: {fail(key, value, 'no such key')}")
        if key in ("compile_config", "watermarking_config", "cache_config") and value is not None:
            raise ConfigError(f"{path}: {fail(key, value, 'null; it is an argument of generate')}")
