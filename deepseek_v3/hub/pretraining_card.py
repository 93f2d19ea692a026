"""The card of a pretrained model, from the run's own record: a missing figure is an error, never a placeholder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..configuration import DeepseekV3Config
from ..configuration.local_paths import without_paths
from ..durable import file_sha256
from .card import (
    CITATION,
    HERE,
    Measured,
    architecture,
    better_baselines,
    copy_figure,
    read_config,
    recipe_block,
    render,
    results,
    software,
    table,
    write_with_record,
)
from .folder import EVALUATED, evaluated_hashes, read_object

NAMES = {"gzip": "gzip -9", "5-gram": "5-gram (Kneser-Ney, same tokens)", "dense": "dense model of equal compute"}


def write_pretraining_card(folder: str | Path, record: Mapping[str, Any], weights_licence: str = "apache-2.0") -> Path:
    """Write `README.md` (and `run.json`, `load.png`) for the checkpoint in `folder`, from what `training.pretrain`
    returned. `evaluation.json`, if `deepseek-v3 evaluate` left one of these weights in `folder`, adds figures with
    intervals. A `README.md` that was changed is kept.

    Raises:
        ValueError: the record lacks a field that the card states (named), `config.json` cannot be read, or the run's
            plot of the experts' load does not lie in `folder` or above it.
    """
    folder = Path(folder)
    config = read_config(folder)
    record = without_paths(record)
    try:
        measured = _figures(folder)
        data = _front_matter(record, measured, weights_licence)
        shape = table(architecture(config, record["parameters"]))
        fields = _fields(folder, config, record, measured)
        fields |= {"architecture": shape, "weights_licence": weights_licence}
    except KeyError as error:
        raise ValueError(f"model card of {folder}: the run's record has no field {error}") from None
    return write_with_record(folder, render("pretraining_card.md", folder, data, fields), record)


def _figures(folder: Path) -> dict[str, Any]:
    """The figures of texts in `evaluation.json`, unless the run went on since and replaced the weights."""
    of = evaluated_hashes(folder)
    if any(not (folder / name).is_file() or file_sha256(folder / name) != digest for name, digest in of.items()):
        return {}
    path = folder / EVALUATED
    return without_paths(read_object(path)).get("text", {}) if path.exists() else {}


def _title(record: Mapping[str, Any]) -> str:
    return f"DeepSeek-V3 architecture, {record['parameters']['total'] / 1e6:.1f}M, {record['corpus']['name']}"


def _front_matter(record: Mapping[str, Any], measured: Mapping[str, Any], weights_licence: str) -> ModelCardData:
    corpus = record["corpus"]
    figure = {"value": record["heldout_bits_per_byte"], "n": f"{corpus['heldout_documents']} documents"}
    entries = [(corpus["name"], corpus["sha256"], figure)]
    entries += [(found["name"], found["sha256"], found["bits_per_byte"]) for found in measured.values()]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=weights_licence,
        tags=["deepseek_v3", "mixture-of-experts", "multi-token-prediction"],
        model_name=_title(record),
        eval_results=[
            result
            for name, digest, figure in entries
            for result in results(
                "text-generation", name, "held-out", digest, [Measured("bits_per_byte", "bits per byte", figure)]
            )
        ],
    )


def _fields(
    folder: Path, config: DeepseekV3Config, record: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, str]:
    recipe, corpus, parameters = record["recipe"], record["corpus"], record["parameters"]
    warmed_up = min(1, record["steps"] / max(1, recipe["warmup_steps"]))  # a shorter run ends before the peak
    training = {
        "tokens": f"{record['tokens']:,} in {record['steps']:,} steps of {recipe['batch_size']} x "
        f"{recipe['sequence_length']}",
        "compute": f"{record['train_flops']:.3g} FLOPs, {record['train_seconds']} s",
        "optimizer": f"AdamW ({recipe['beta1']}, {recipe['beta2']}), weight decay {recipe['weight_decay']}, peak "
        f"learning rate {recipe['learning_rate'] * warmed_up:g}, cosine",
        "precision": record["dtype"],
        "seed": recipe["seed"],
        **software(record["environment"]),
        "date": record["date"],
    }
    evaluation = {"**this model**": f"**{record['heldout_bits_per_byte']:.3f}**"}
    baselines = {NAMES.get(key, key): value for key, value in record["baselines_bits_per_byte"].items()}
    evaluation |= {name: f"{value:.3f}" for name, value in baselines.items()}
    licence = corpus["licence"] or "as the source states"
    return {
        "title": _title(record),
        "total": f"{parameters['total'] / 1e6:.1f}M",
        "activated": f"{parameters['activated'] / 1e6:.1f}M",
        "here": HERE,
        "use_mtp": str(bool(record["mtp"])),
        "data": f"{corpus['name']}: {corpus['train_documents']:,} documents, {corpus['train_bytes']:,} bytes for "
        f"training and {corpus['heldout_documents']:,} documents, {corpus['heldout_bytes']:,} bytes held out. What is "
        f"held out is {corpus['split']}. SHA-256 of the text: `{corpus['sha256']}`. Licence: {licence}.",
        "training": table(training),
        "recipe": recipe_block(recipe),
        "heldout": f"{corpus['heldout_documents']:,} documents",
        "sequence_length": str(recipe["sequence_length"]),
        "context": str(recipe["sequence_length"] // 2),
        "evaluation": table(evaluation),
        "better": better_baselines("bits per byte", record["heldout_bits_per_byte"], baselines, higher=False),
        "measured": _measured(measured),
        "mtp": _mtp(record["mtp"], config),
        "load": _load(folder, record["load"], recipe["log_every"]),
        "corpus_name": corpus["name"],
        "licence": licence,
        "citation": CITATION,
    }


def _mtp(mtp: Mapping[str, Any] | None, config: DeepseekV3Config) -> str:
    if not config.num_nextn_predict_layers:
        return "The model has no MTP layer."
    if mtp is None:
        trained = "no draft was made on the held-out prompts" if config.mtp_loss_coef else "not trained, so not used"
        return f"MTP: {trained}."
    return (
        f"MTP, greedy, one draft per step on held-out prompts: {mtp['acceptance']:.1%} of {mtp['drafts']:,} "
        f"drafts accepted, {mtp['tokens_per_forward']:.2f} tokens per forward pass."
    )


def _measured(measured: Mapping[str, Any]) -> str:
    """The figures of `deepseek-v3 evaluate`, with intervals."""
    lines = [
        f"- {found['name']} (SHA-256 `{found['sha256']}`): {found['bits_per_byte']['value']:.3f} bits per byte, 95 % "
        f"interval {found['bits_per_byte']['low']:.3f} to {found['bits_per_byte']['high']:.3f} over "
        f"{found['bits_per_byte']['n']:,} rows of {found['length']} tokens"
        for found in measured.values()
    ]
    return "\n".join(["Measured again, with intervals, by `deepseek-v3 evaluate`:", "", *lines]) if lines else ""


def _load(folder: Path, load: Mapping[str, Any], steps: int) -> str:
    peak, last, dead = (load[name] for name in ("max_violation_peak", "max_violation_last", "dead_experts_last"))
    if peak is None:
        return "The model has no routed experts."
    beside = folder / "load.png"
    plot = copy_figure(beside if beside.exists() else folder.parent / "load.png", folder)
    return (
        f"Expert load: MaxVio (`max / mean - 1`, mean over layers and over {steps:,} steps at a time) peaked at "
        f"{peak:.2f} and was {last:.2f} at the end; share of experts that no token chose in the last "
        f"steps: {dead:.1%}.\n\n"
        f"![MaxVio over the run, and each expert's share of the last steps' tokens]({plot})"
    )
