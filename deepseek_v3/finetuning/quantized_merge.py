"""Merging an adapter that was trained on a quantized base, into the weights that it was trained on."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..quantization import dequantize_
from .adapters import load_adapter


def merge_quantized(model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """-> the base model with plain weights `quantized value + scaling * B A`, all in `dtype` (by default the base's).

    Works in place: `model` is used up. PEFT's own merge would round the result to NF4 again, and refuses the experts
    and packed weights. As PEFT merges: these values and the experts' updates are rounded to `dtype` before they are
    added. Needs memory for the whole model in `dtype`.

    Raises:
        ValueError: a base that is not quantized, or other than one active adapter.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(f"active adapters: found {model.active_adapters}, allowed is one")
    (adapter,) = model.active_adapters
    with tempfile.TemporaryDirectory() as folder:  # its files are what can be put on another base
        model.save_pretrained(folder, selected_adapters=[adapter])
        base = dequantize_(model.unload(), dtype)
        merged = load_adapter(base, Path(folder) / ("" if adapter == "default" else adapter))
    return merged.merge_and_unload()
