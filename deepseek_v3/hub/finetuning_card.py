"""Cards of fine-tuned models and adapters, from the run's own record: a missing figure is an error."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

TEMPLATE = Path(__file__).with_name("finetuning_card.md")
FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "roc_auc": "ROC AUC",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "mean_cost": "mean cost",
    "review_rate_at_recall": "review rate at 90 % recall",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "rouge_l": "ROUGE-L",
}
RISKS = {
    "german-credit": "Credit decisions about people are high-risk use under the EU AI Act and fall under rules "
    "against discrimination. The data are from Germany in the 1970s, a thousand cases of one bank. The model must not "
    "decide on anybody's credit; figures by group have to be looked at before any other use.",
    "icd10-chapter": "The model sorts official descriptions of diagnoses into chapters. It has seen no patient and no "
    "clinical note, must not be used to code or to treat, and is no medical device.",
}
MEDICAL = ("pubmedqa", "medquad", "chinese-medical-dialogue")
FINANCIAL = ("financial-phrasebank", "financeiq")


def write_finetuning_cards(output: str | Path, record: Mapping[str, Any]) -> list[Path]:
    """Write `README.md` into each of `output`'s `adapter/`, `merged/` and `model/` that the record names.

    `record` is what `finetuning.finetune` returned. Raises `ValueError` naming a field that it lacks.
    """
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    try:
        folders = [Path(output) / name for name in record["artifacts"]]
        cards = {folder / "README.md": template.substitute(_fields(folder, record)) for folder in folders}
    except KeyError as error:
        raise ValueError(f"model cards of {output}: the run's record has no field {error}") from None
    for path, card in cards.items():
        path.write_text(card, encoding="utf-8")
    return list(cards)


def figure_text(figure: Mapping[str, Any] | None) -> str:
    """`value [low, high]`; the value alone where there is no interval, as of a single item."""
    if not figure or figure["value"] is None:
        return "undefined"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _fields(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    recipe, task, trainable = record["recipe"], record["task"], record["trainable"]
    classifies = task["kind"] == "classification"
    adapter = folder.name == "adapter"
    how = {"lora": "LoRA", "full": "Full fine-tuning", "head": "A head on the frozen base"}[recipe["method"]]
    how = "QLoRA (NF4 base)" if recipe["quantize"] == "nf4" else how
    how += "" if recipe["unfreezing"] is None else " with progressive unfreezing"
    training = {
        "method": how,
        "trained": f"{trainable['trainable']:,} of {trainable['parameters']:,} parameters ({trainable['share']:.2%})",
        **({"targets": ", ".join(recipe["targets"]), "rank": recipe["rank"]} if recipe["method"] == "lora" else {}),
        "steps": f"{record['steps']:,} ({record['epochs']:.2f} epochs of {task['rows']['train']:,} rows)",
        "learning rate": f"{record['learning_rate']:g}, {record['batch_size']:,} rows per step",
        "seed": recipe["seed"],
        "time": f"{record['train_seconds']:,.0f} s on {record['environment']['device']}",
        "peak memory": f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "size": f"{record['artifacts'][folder.name]['bytes'] / 1e6:,.1f} MB",
        "software": f"torch {record['environment']['torch']}, transformers {record['environment']['transformers']}, "
        f"PEFT {record['environment']['peft']}",
    }
    licence = task["licence"] or "as the source states"
    return {
        "library": "peft" if adapter else "transformers",
        "base": recipe["base"],
        "relation": "adapter" if adapter else "finetune",
        "pipeline": "text-classification" if classifies else "text-generation",
        "tags": "- lora" if recipe["method"] == "lora" else "- fine-tuned",
        "title": f"{task['name']}: {'adapter' if adapter else 'model'}",
        "what": f"{how} for the {task['kind']} task `{task['name']}`",
        "usage": _usage(folder, recipe, task["labels"], adapter),
        "data": f"{task['source']}. {task['rows']['train']:,} rows for training, {task['rows']['validation']:,} for "
        f"validation, {task['rows']['test']:,} for the test. Licence: {licence}. SHA-256: `{task['sha256']}`.",
        "notes": "\n".join(f"- {note}" for note in task["notes"]),
        "training": "\n".join(f"| {name} | {value} |" for name, value in training.items()),
        "rows": f"{record['test']['n']:,}",
        "seed": str(recipe["seed"]),
        "unit": "groups" if "n_groups" in record["test"] else "rows",
        "results": _results(record),
        "threshold": _threshold(record["test"]),
        "forgetting": _forgetting(record["general_bits_per_byte"]),
        "movement": _movement(record["experts"]),
        "risks": _risks(task["name"]),
    }


def _usage(folder: Path, recipe: Mapping[str, Any], labels: Any, adapter: bool) -> str:
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    lines = ["import deepseek_v3", f"from transformers import AutoTokenizer, {auto}", ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
    if adapter:
        lines[1:1] = ["from peft import PeftModel"]
        count = f", num_labels={len(labels)}" if labels else ""
        lines += [f'model = {auto}.from_pretrained("{recipe["base"]}"{count})']
        lines += ["model.config.pad_token_id = tokenizer.pad_token_id"] if labels else []
        lines += [f'model = PeftModel.from_pretrained(model, "{folder}")']
    else:
        lines += [f'model = {auto}.from_pretrained("{folder}")']
    return "\n".join(lines)


def _results(record: Mapping[str, Any]) -> str:
    rows = {"this model": record["test"], **record["baselines"]}
    names = [name for name in FIGURES if record["test"].get(name)]
    lines = ["| | " + " | ".join(FIGURES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for who, results in rows.items():
        lines.append(f"| {who} | " + " | ".join(figure_text(results.get(name)) for name in names) + " |")
    return "\n".join(lines)


def _threshold(test: Mapping[str, Any]) -> str:
    if "at_validation_recall" not in test:
        return ""
    at = test["at_validation_recall"]
    return (
        f"At the threshold {at['threshold']:.3f}, which finds {at['recall']:.0%} of the positive validation rows: "
        f"sensitivity {figure_text(at['sensitivity'])}, specificity {figure_text(at['specificity'])}, share of rows "
        f"to review {figure_text(at['review_rate'])}.\n"
    )


def _forgetting(bits: Mapping[str, float]) -> str:
    if not bits:
        return "Forgetting was not measured."
    return f"General text: {bits['before']:.3f} bits per byte before, {bits['after']:.3f} after (lower is better)."


def _movement(experts: Mapping[str, Any]) -> str:
    if not experts:
        return "The routed experts did not move."
    layers = experts["layers"]
    name, most = max(layers.items(), key=lambda item: item[1]["max"])
    mean = sum(layer["mean"] for layer in layers.values()) / len(layers)
    return (
        f"The routed experts' weights moved by {mean:.3%} of their norm on average, most of all expert "
        f"{most['most'][0][0]} of `{name}`, by {most['max']:.3%}. The tenth of the experts that moved most holds "
        f"{experts['share_of_top_tenth']:.0%} of the squared movement (10 % would be even)."
    )


def _risks(task: str) -> str:
    if task in RISKS:
        return RISKS[task]
    if task in MEDICAL:
        return (
            "Text about medicine, not medical advice. The model was tested on the rows above and on no patient; it "
            "must not be used to diagnose or to treat, and is no medical device."
        )
    if task in FINANCIAL:
        return "Text about finance, not advice. The model was tested on the rows above only; do not trade on it."
    return "Tested on the rows above and on nothing else: test it on your own data before you use it."
