"""Model cards, written from a run's own record: a missing figure is an error, never a placeholder."""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

TEMPLATE = Path(__file__).with_name("pretraining_card.md")
CONFIG_FIELDS = (
    *("num_hidden_layers", "first_k_dense_replace", "hidden_size", "num_attention_heads", "kv_lora_rank"),
    *("qk_rope_head_dim", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"),
    *("num_nextn_predict_layers", "vocab_size"),
)


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def write_pretraining_card(folder: str | Path, record: Mapping[str, Any], weights_licence: str = "apache-2.0") -> Path:
    """Write `folder/README.md` for the checkpoint there from the record that `training.pretrain` returned.

    Raises:
        ValueError: the record lacks a field that the card states (named), or `config.json` cannot be read.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    try:
        fields = _fields(folder, config, record)
    except KeyError as error:
        raise ValueError(f"model card of {folder}: the run's record has no field {error}") from None
    card = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields, weights_licence=weights_licence)
    path = folder / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in CONFIG_FIELDS if name not in config]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if missing:
        raise ValueError(f"{path}: has no field {', '.join(missing)}")
    return config


def _fields(folder: Path, config: dict[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    recipe, corpus, environment = record["recipe"], record["corpus"], record["environment"]
    parameters, load, mtp = record["parameters"], record["load"], record["mtp"]
    architecture = {
        "layers": f"{config['num_hidden_layers']}, the first {config['first_k_dense_replace']} dense",
        "hidden size": config["hidden_size"],
        "attention": f"MLA, {config['num_attention_heads']} heads, latent {config['kv_lora_rank']}, "
        f"rope {config['qk_rope_head_dim']}",
        "experts": f"{config['n_routed_experts']} routed (top {config['num_experts_per_tok']}) + "
        f"{config['n_shared_experts']} shared, each {config['moe_intermediate_size']} wide",
        "MTP layers": f"{config['num_nextn_predict_layers']} ({parameters['mtp']:,} parameters)",
        "vocabulary": config["vocab_size"],
        "parameters": f"{parameters['total']:,} total, {parameters['activated']:,} per token",
    }
    training = {
        "tokens": f"{record['tokens']:,} in {record['steps']:,} steps of {recipe['batch_size']} x "
        f"{recipe['sequence_length']}",
        "compute": f"{record['train_flops']:.3g} FLOPs, {record['train_seconds']} s on {environment['device']} with "
        f"{environment['threads']} threads",
        "optimizer": f"AdamW ({recipe['beta1']}, {recipe['beta2']}), weight decay {recipe['weight_decay']}, peak "
        f"learning rate {recipe['learning_rate']}, cosine",
        "precision": record["dtype"],
        "seed": recipe["seed"],
        "versions": f"Python {environment['python']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}",
        "date": record["date"],
    }
    evaluation = {"**this model**": f"**{record['heldout_bits_per_byte']:.3f}**"}
    names = {"gzip": "gzip -9", "5-gram": "5-gram (Kneser-Ney, same tokens)", "dense": "dense model of equal compute"}
    for key, value in record["baselines_bits_per_byte"].items():
        evaluation[names.get(key, key)] = f"{value:.3f}"
    mtp_text = "The model has no MTP layer."
    if mtp:
        mtp_text = (
            f"MTP, greedy, one draft per step on held-out prompts: {mtp['acceptance']:.1%} of {mtp['drafts']:,} "
            f"drafts accepted, {mtp['tokens_per_forward']:.2f} tokens per forward pass."
        )
    licence = corpus["licence"] or "as the source states"
    return {
        "title": f"DeepSeek-V3 architecture, {parameters['total'] / 1e6:.1f}M, {corpus['name']}",
        "total": f"{parameters['total'] / 1e6:.1f}M",
        "activated": f"{parameters['activated'] / 1e6:.1f}M",
        "folder": str(folder),
        "use_mtp": str(bool(mtp)),
        "architecture": _table(architecture),
        "data": f"{corpus['name']}: {corpus['train_documents']:,} documents, {corpus['train_bytes']:,} bytes for "
        f"training and {corpus['heldout_documents']:,} documents, {corpus['heldout_bytes']:,} bytes held out, split "
        f"by a hash of the document names. SHA-256 of the text: `{corpus['sha256']}`. Licence: {licence}.",
        "training": _table(training),
        "sequence_length": str(recipe["sequence_length"]),
        "context": str(recipe["sequence_length"] // 2),
        "evaluation": _table(evaluation),
        "mtp": mtp_text,
        "maxvio_peak": "n/a" if load["max_violation_peak"] is None else f"{load['max_violation_peak']:.2f}",
        "maxvio_last": "n/a" if load["max_violation_last"] is None else f"{load['max_violation_last']:.2f}",
        "dead": "n/a" if load["dead_experts_last"] is None else f"{load['dead_experts_last']:.1%}",
        "corpus_name": corpus["name"],
        "licence": licence,
    }
