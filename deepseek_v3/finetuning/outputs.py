"""What a run leaves in its folder: what it was begun with, so that it goes on with nothing else, and what it made."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..configuration import DeepseekV3Config
from ..configuration.licence import licence_files
from .build import base_folder, load_tokenizer, unwrapped
from .lora import report_trainable
from .quantized_merge import merge_quantized
from .recipe import FinetuneRecipe

RECORD = "run.json"
RECIPE = "recipe.json"
INPUTS = "inputs.json"  # digests of the fields `task` and `base`
# What may change between the parts of one run; and, until it is finished, what only its record depends on.
FREE = ("output_dir", "micro_batch_size", "report_to", "merge", "gradient_checkpointing")
UNTIL_FINISHED = ("compare",)
# Of a base, what the model and its tokens depend on; and how much of each file is read.
BASE_FILES = ("config.json", "tokenizer*", "chat_template*", "*.safetensors*")
BLOCKS, BLOCK_BYTES = 64, 2**18


def read_record(path: Path, recipe: FinetuneRecipe) -> dict[str, Any]:
    """The record of a finished run of this recipe, or ValueError."""
    record = _read(path)
    saved = record.get("recipe")
    if not isinstance(saved, dict) or not record.get("finished"):
        raise ValueError(f"{path}: not the record of a finished run; --restart trains it again")
    _check_same(saved, recipe, path, FREE)
    return record


def check_recipe(output: Path, recipe: FinetuneRecipe) -> None:
    """ValueError unless `output` holds a run of this recipe, but for the fields in `FREE` and `UNTIL_FINISHED`."""
    _check_same(_read(output / RECIPE), recipe, output / RECIPE, (*FREE, *UNTIL_FINISHED))


def check_inputs(output: Path, recipe: FinetuneRecipe, inputs: Mapping[str, str | None]) -> None:
    """ValueError if `output` holds a run that was begun with other `inputs`, digests of the recipe's task and base.

    A digest that is not known, now or in the folder of an earlier version, is not compared.
    """
    saved = _read(output / INPUTS) if (output / INPUTS).exists() else {}
    for name, digest in inputs.items():
        if None not in (digest, saved.get(name)) and saved[name] != digest:
            found = f"its digest is {digest}, that of the run {saved[name]}"
            changed = f"{name} {getattr(recipe, name)} has changed"
            raise ValueError(f"{output / INPUTS}: {changed}: {found}; use another output_dir or --restart")


def base_digest(base: str | Path) -> str | None:
    """SHA-256 over names, sizes and contents of a base's weights, config.json and tokenizer files.

    Of a file over 16 MiB it takes 64 blocks of 256 KiB, evenly spread from the first byte to the last; names, sizes
    and headers alone are those of any model of the same shapes. None if nothing of the base is on this machine.
    """
    try:
        folder = base_folder(base)
    except (OSError, ValueError):  # huggingface_hub's for what is not cached, or is no name of a repository
        return None
    digest = hashlib.sha256()
    for file in sorted({path for pattern in BASE_FILES for path in folder.glob(pattern) if path.is_file()}):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for block in range(BLOCKS):
                if size > BLOCKS * BLOCK_BYTES:
                    stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def save(recipe: FinetuneRecipe, model: nn.Module) -> dict[str, dict[str, int]]:
    """Write what was trained, `model` used up. Returns the folders with their sizes in bytes."""
    if recipe.method != "lora":
        return {"model": _write("model", recipe, model)}
    written = {"adapter": _write("adapter", recipe, model)}
    return {**written, "merged": save_merged(recipe, model)} if recipe.merge else written


def save_merged(recipe: FinetuneRecipe, model: nn.Module) -> dict[str, int]:
    """Write the base with the adapters of `model` merged into the weights that they were trained on."""
    quantized = report_trainable(model)["quantized_byte_fraction"] > 0
    return _write("merged", recipe, merge_quantized(model) if quantized else model.merge_and_unload())


def _write(name: str, recipe: FinetuneRecipe, model: nn.Module) -> dict[str, int]:
    """The folder appears whole."""
    config, original = unwrapped(model).config, DeepseekV3Config.from_pretrained(recipe.base)
    for field in ("mtp_loss_coef", "seq_balance_coef", "use_cache"):  # off while training
        setattr(config, field, getattr(original, field))
    part, folder = (Path(recipe.output_dir) / each for each in (f".{name}.tmp", name))
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in, with the local path of the base
    load_tokenizer(recipe.base).save_pretrained(part)  # the one that was used would cut every text to max_length
    for each, file in licence_files(base_folder(recipe.base)).items():
        shutil.copyfile(file, part / each)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return {"bytes": sum(file.stat().st_size for file in folder.iterdir())}


def clear(output: Path) -> None:
    """Remove a run."""
    for name in ("checkpoints", "adapter", "merged", "model"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (RECORD, RECIPE, INPUTS):
        (output / name).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, allowed is an object")
    return content


def _check_same(saved: Mapping[str, Any], recipe: FinetuneRecipe, where: Path, free: tuple[str, ...]) -> None:
    for name, value in dataclasses.asdict(recipe).items():
        if name not in free and saved.get(name) != value:
            raise ValueError(
                f"{where}: a run with {name} = {saved.get(name)!r}, the recipe has {value!r}; use another output_dir"
            )
