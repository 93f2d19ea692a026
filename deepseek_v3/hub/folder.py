"""What of a folder is published: a closed list of files, and weights that are whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..configuration import DeepseekV3Config
from ..configuration.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..configuration.licence import is_licence_file
from ..modeling_deepseek_v3.checkpoint import check_tensors
from ..modeling_deepseek_v3.weight_files import INDEX_NAME, read_header, read_json, scan_folder
from .card import CARD, RECORD

CONVERTED, EXPORT, VERIFIED, EVALUATED = "conversion.json", "export.json", "verify.json", "evaluation.json"
RECORDS = (RECORD, CONVERTED, EXPORT, VERIFIED, EVALUATED)
# Published if they are there, beside weights and licence. No pickles, no training arguments, no optimizer states.
ALLOWED = frozenset(
    {
        *(CARD, "config.json", "generation_config.json", ADAPTER_CONFIG),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "chat_template.jinja"),
        *RECORDS,
        *("load.png", "loss.png", "samples.txt"),
    }
)
TEMPLATES = "additional_chat_templates"  # a folder; of it, what ends in .jinja
# left by a command that was stopped while it wrote a record; the record itself is whole, or not there
_UNFINISHED_RECORDS = {f"{name}.partial" for name in RECORDS if name != EXPORT}


@dataclass(frozen=True)
class Publication:
    """What a folder holds.

    Attributes:
        kind: `adapter`, `quantized` or `checkpoint`.
        files: name -> path of what is to be uploaded.
        left_out: names of everything else in the folder.
    """

    kind: Literal["adapter", "quantized", "checkpoint"]
    files: dict[str, Path]
    left_out: tuple[str, ...]


def read_folder(folder: Path) -> Publication:
    """Decide what of `folder` is published, and check that its weights are whole.

    Raises:
        ValueError: no folder, an export that is not finished, links that leave the folder, or weights that are
            missing, cut off or do not fit `config.json`; names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    names = sorted(path.name for path in folder.iterdir())
    if (folder / TEMPLATES).is_dir():
        names.remove(TEMPLATES)
        names += sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).iterdir())
    unfinished = {name for name in names if name == ".export.json" or name.endswith(".partial")} - _UNFINISHED_RECORDS
    if unfinished:
        raise ValueError(f"{folder / min(unfinished)}: the export is not finished; the same export command goes on")
    kind, weights = _weights(folder)
    allowed = ALLOWED | weights
    allowed |= {name for name in names if is_licence_file(name) or Path(name).match(f"{TEMPLATES}/*.jinja")}
    chosen = {name: folder / name for name in names if name in allowed}
    for path in chosen.values():
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: leads to {path.resolve()}; only files in the folder itself are published")
    return Publication(kind, chosen, tuple(name for name in names if name not in chosen))


def _weights(folder: Path) -> tuple[Literal["adapter", "quantized", "checkpoint"], set[str]]:
    """The kind of the folder and the names of its files of weights."""
    if (folder / ADAPTER_CONFIG).exists():
        read_object(folder / ADAPTER_CONFIG)
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise ValueError(f"{folder}: has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")
        read_header(folder / ADAPTER_WEIGHTS)
        return "adapter", {ADAPTER_WEIGHTS}
    if gguf := {path.name for path in folder.glob("*.gguf")}:
        unknown = sorted(gguf - recorded_hashes(folder).keys())
        if unknown:
            raise ValueError(f"{folder / unknown[0]}: export.json beside it does not say whether it is whole")
        return "quantized", gguf
    raw = read_object(folder / "config.json")
    entries = scan_folder(folder)
    quantization = raw.get("quantization_config")
    if quantization is None:
        config = DeepseekV3Config.from_pretrained(folder)
        architecture = (config.architectures or [""])[0]
        causal = architecture.endswith("ForCausalLM")
        mtp = causal and config.num_nextn_predict_layers > 0
        check_tensors(entries, config, str(folder), lm_head=causal, mtp=mtp)
    names = {entry.file.name for entry in entries.values()}
    if (folder / INDEX_NAME).exists():
        names.add(INDEX_NAME)
    return "checkpoint" if quantization is None else "quantized", names


def read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: not found; a folder to publish holds config.json, {ADAPTER_CONFIG} or a GGUF file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, allowed is an object")
    return content


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that an export wrote, by its report; empty for a folder that is none.

    Raises:
        ValueError: `export.json` is no such report.
    """
    path = folder / EXPORT
    if not path.exists():
        return {}
    try:
        return {name: file["sha256"] for name, file in read_object(path)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no report of an export ({type(error).__name__}: {error})") from None


def evaluated_hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the weights that `evaluation.json` is about; empty where it names none, or is not there.

    Raises:
        ValueError: `files` is no such table.
    """
    path = folder / EVALUATED
    files = read_object(path).get("files", {}) if path.exists() else {}
    if not isinstance(files, dict):
        raise ValueError(f"{path}: files: found {type(files).__name__}, allowed is an object")
    return files
