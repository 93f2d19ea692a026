"""What the cards share: front matter, tables, a recipe without local paths, and writing nothing that is not valid."""

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration import DeepseekV3Config, num_parameters
from ..configuration.local_paths import without_paths
from ..durable import write_json
from ..process import say
from .metadata import read_card
from .secrets import check_no_secrets

CARD = "README.md"
RECORD = "run.json"
# The line in a card's code that names the folder which holds the card; `push` puts the repository's name there.
HERE = 'repository = "."'
# The last line of a card on the disk, by which `write_card` tells whether it is as it was written.
_MARK = re.compile(r"\n<!-- written by deepseek-v3; SHA-256 of the card above: [0-9a-f]{64} -->\n")
_FORM = "\n# Model Card for Model ID\n"  # of the form that PEFT saves with every adapter, until somebody fills it in
CITATION = """```bibtex
@misc{deepseekai2024deepseekv3,
  title = {{DeepSeek-V3} Technical Report},
  author = {{DeepSeek-AI}},
  year = {2024},
  eprint = {2412.19437},
  archivePrefix = {arXiv},
  primaryClass = {cs.CL}
}
```"""


def render(template: str, where: Path, data: ModelCardData, fields: Mapping[str, str]) -> str:
    """The card: front matter from `data`, text from the template of that name beside this file.

    Raises:
        ValueError: the card would not be valid, or holds a secret or a path of a home folder.
    """
    text = Template(Path(__file__).with_name(template).read_text(encoding="utf-8")).substitute(fields)
    text = re.sub(r"\n{3,}", "\n\n", text)  # where a part was empty
    card = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{text}"
    read_card(card, str(where))
    check_no_secrets({str(where): card.encode()})
    return card


def write_card(folder: Path, card: str) -> Path:
    """Write the card with a mark of its content. One that was changed since is kept, which is said."""
    path = folder / CARD
    found = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    if found.strip() and _FORM not in found and found != _marked(_MARK.sub("", found)):
        say(f"{path}: is not as it was written here, and is kept; delete it for a new one")
    else:
        path.write_text(_marked(card), encoding="utf-8")
    return path


def load_card(path: Path, base_model: str | None = None) -> ModelCard:
    """A card without the mark of `write_card`, which concerns its folder only; otherwise as `read_card`."""
    return read_card(_MARK.sub("", path.read_text(encoding="utf-8")), str(path), base_model)


def source_card(folder: Path) -> ModelCard | None:
    """The card of what a model is made from; None where there is none, or none that is valid, which is said."""
    path = folder / CARD
    try:
        return load_card(path) if path.is_file() else None
    except ValueError as error:
        say(f"{error}; nothing is taken from that card")
        return None


def licence_fields(stated: str | None, card: ModelCard | None) -> dict[str, Any]:
    """The front matter's fields for a licence: `stated`, or else that of the card, with its name and link."""
    if stated:
        return {"license": stated}
    fields = ("license", "license_name", "license_link")
    return {} if card is None else {field: card.data[field] for field in fields if card.data.get(field)}


def licence_name(fields: Mapping[str, Any]) -> str | None:
    """What `licence_fields` found, in a word."""
    return fields.get("license_name") or fields.get("license")


def _marked(card: str) -> str:
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- written by deepseek-v3; SHA-256 of the card above: {digest} -->\n"


def write_with_record(folder: Path, card: str, record: Mapping[str, Any]) -> Path:
    """`write_card`, and beside it the run's record without local paths; both are published."""
    path = write_card(folder, card)
    write_json(folder / RECORD, without_paths(record))
    return path


def table(rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def grid(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of several columns."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def better_baselines(metric: str, own: float, baselines: Mapping[str, float], higher: bool) -> str:
    """A sentence that says which baselines did better."""
    better = [name for name, value in baselines.items() if (value > own if higher else value < own)]
    if not baselines:
        return "No baseline was measured."
    return f"Baselines with better {metric} than this model: {', '.join(better) or 'none'}."


def recipe_block(recipe: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(without_paths(recipe), sort_keys=False, width=110)}```"


def software(environment: Mapping[str, Any], libraries: Sequence[str] = ("torch", "transformers")) -> dict[str, str]:
    """Rows for a table of how something was made."""
    commit = environment["git"]
    source = f"commit `{commit}`" if commit else "without its repository"
    versions = ", ".join(f"{library} {environment[library]}" for library in libraries)
    return {
        "hardware": f"{environment['hardware']}; device {environment['device']}, {environment['threads']} threads",
        "software": f"deepseek-v3 {environment['package']}, {source}; Python {environment['python']}, {versions}",
    }


def architecture(config: DeepseekV3Config, parameters: Mapping[str, int] | None = None) -> dict[str, object]:
    """Rows for a table of the model's shape; `parameters` (`total`, `activated`, `mtp`) as recorded, or counted."""
    count = dataclasses.asdict(num_parameters(config)) if parameters is None else parameters
    return {
        "layers": f"{config.num_hidden_layers}, the first {config.first_k_dense_replace} dense",
        "hidden size": config.hidden_size,
        "attention": f"MLA, {config.num_attention_heads} heads, latent {config.kv_lora_rank}, "
        f"rope {config.qk_rope_head_dim}",
        "experts": f"{config.n_routed_experts} routed (top {config.num_experts_per_tok}) + "
        f"{config.n_shared_experts} shared, each {config.moe_intermediate_size} wide",
        "MTP layers": f"{config.num_nextn_predict_layers} ({count['mtp']:,} parameters)",
        "vocabulary": config.vocab_size,
        "parameters": f"{count['total']:,} total, {count['activated']:,} per token",
    }


def read_config(folder: str | Path) -> DeepseekV3Config:
    """ValueError names what cannot be read."""
    try:
        return DeepseekV3Config.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder}: config.json cannot be read ({str(error).splitlines()[0]})") from None


@dataclasses.dataclass(frozen=True)
class Measured:
    """One figure for `model-index`.

    Attributes:
        metric, name: its identifier and its name.
        figure: `value`, and where they are known the interval `low`, `high` (95 %) and the number of items, `n`.
    """

    metric: str
    name: str
    figure: Mapping[str, Any]


def results(task: str, dataset: str, split: str, digest: str, measured: Iterable[Measured]) -> list[EvalResult]:
    """Entries of `model-index`; n and interval stand in a metric's name, for which its format has no field."""
    found = []
    for one in measured:
        value = one.figure["value"]
        if value is None:
            continue
        notes = [one.name]
        if one.figure.get("low") is not None:
            notes.append(f"95 % interval {one.figure['low']:.4g} to {one.figure['high']:.4g}")
        if one.figure.get("n") is not None:
            notes.append(f"n = {one.figure['n']}")
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=re.sub(r"[^a-z0-9._-]+", "-", dataset.lower()).strip("-.") or "custom",
                dataset_name=dataset,
                dataset_split=split,
                dataset_revision=digest,
                metric_type=one.metric,
                metric_value=round(value, 6),
                metric_name=", ".join(notes),
            )
        )
    return found


def copy_figure(path: Path, folder: Path) -> str:
    """Copy an image beside the card, and return its name. ValueError if the run did not leave it."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; the card of {folder} shows it")
    if path.parent.resolve() != folder.resolve():
        shutil.copyfile(path, folder / path.name)
    return path.name
