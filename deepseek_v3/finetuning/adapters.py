"""Adapters from disk: files of strangers, checked before PEFT reads them."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import PreTrainedModel

from ..configuration.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from ..modeling_deepseek_v3.checkpoint import FLOATING
from ..modeling_deepseek_v3.weight_files import TensorEntry, read_header
from .lora import injecting
from .lora_layers import register_layers


def load_adapter(
    model: PreTrainedModel | PeftModel,
    path: str | PathLike,
    trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """`PeftModel.from_pretrained`, or `load_adapter` of a model that has adapters, with this package's wrappers.

    `path`: a folder that an adapter was saved in, by this package or by plain PEFT, or a repository on the Hub. Its
    files are checked first, and its tensors must be those of the configuration, no more and no fewer; but those of MTP
    layers that the model lacks are left out.

    Raises:
        ValueError: names the file and the field or tensor, what was found and what is allowed; `model` then has an
            untrained adapter, unless the configuration was refused.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    file = folder / ADAPTER_WEIGHTS
    fields = read_adapter_config(folder)
    if not file.is_file():
        raise ValueError(f"{folder}: found no {ADAPTER_WEIGHTS}, allowed are adapters in that file")
    entries = read_header(file)
    base = fields.pop("base_model_name_or_path", None)  # get_peft_model warns of another name, and puts its own
    config = register_layers(LoraConfig(**fields))
    config.inference_mode = not trainable
    with injecting(model):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = get_peft_model(model, config, adapter_name)
    _check_tensors(entries, model, adapter_name, file)
    model.load_adapter(str(folder), adapter_name, is_trainable=trainable)
    model.set_requires_grad(adapter_name, trainable)
    config.base_model_name_or_path = base
    return model


def _check_tensors(entries: Mapping[str, TensorEntry], model: PeftModel, adapter_name: str, file: Path) -> None:
    """PEFT fills what is missing with random numbers, and ignores what it does not know."""
    required = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # an adapter of embedding or head may hold the base's weight, too
    known = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True)
    problems = [f"{name:.200} is missing" for name in required if name not in entries]
    for name, entry in entries.items():
        if name not in known:
            layer = re.search(r"\.layers\.(\d{1,9})\.", name)
            if layer is None or int(layer[1]) < model.config.num_hidden_layers:
                problems.append(f"{name:.200} is unexpected")
        elif entry.shape != known[name].shape or entry.dtype not in FLOATING:
            needed = f"{list(known[name].shape)} in {', '.join(FLOATING)}"
            problems.append(f"{name:.200} is {entry.dtype} {list(entry.shape)}, allowed is {needed}")
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems[:4])} ({len(problems)} such)")
