"""Cards of fine-tuned models and adapters, from the run's own record: a missing figure is an error."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..configuration.local_paths import is_repository, without_paths
from .card import (
    CITATION,
    HERE,
    Measured,
    architecture,
    better_baselines,
    grid,
    licence_fields,
    licence_name,
    read_config,
    recipe_block,
    render,
    results,
    software,
    source_card,
    table,
    write_with_record,
)

OPTIMISTIC = "review_rate_at_recall"  # its threshold is found on the test rows: no figure for `model-index`
FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "roc_auc": "ROC AUC",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "mean_cost": "mean cost",
    OPTIMISTIC: "review rate at 90 % recall (threshold from these rows: a lower bound)",
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


def write_finetuning_cards(
    output: str | Path,
    record: Mapping[str, Any],
    *,
    base_model: str | None = None,
    weights_licence: str | None = None,
) -> list[Path]:
    """Write `README.md` and `run.json` into those of `output`'s `adapter/`, `merged/`, `model/` that the record names.
    A `README.md` that was changed is kept.

    Args:
        record: what `finetuning.finetune` returned.
        base_model: the base's repository on the Hub; None takes the recipe's base if that is one. Without it the
            front matter names no base, and `push` asks for it where one is needed.
        weights_licence: None takes the one that the base's own card states, if the base is a folder with a valid card.
            Without it the front matter states none, and `push` asks for it.

    Raises:
        ValueError: the record lacks a field that the card states (named), or the base's configuration cannot be read.
    """
    output = Path(output)
    try:
        base = record["recipe"]["base"]
        base_model = base_model or (base if is_repository(base) else None)
        licence = licence_fields(weights_licence, source_card(Path(base)))
        public = without_paths(record)
        shape = table(architecture(read_config(base)))
        cards = {}
        for name in record["artifacts"]:
            front = _front_matter(name, public, base_model, licence)
            fields = _fields(name, public, base_model) | {
                "architecture": shape,
                "licence": _licence(licence_name(licence), base_model, public),
            }
            cards[output / name] = render("finetuning_card.md", output / name, front, fields)
    except KeyError as error:
        raise ValueError(f"model cards of {output}: the run's record has no field {error}") from None
    return [write_with_record(folder, card, public) for folder, card in cards.items()]


def figure_text(figure: Mapping[str, Any] | None) -> str:
    """`value [low, high]`; the value alone where there is no interval, as of a single item."""
    if not figure or figure["value"] is None:
        return "undefined"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _front_matter(
    artifact: str, record: Mapping[str, Any], base_model: str | None, licence: Mapping[str, Any]
) -> ModelCardData:
    recipe, task, test = record["recipe"], record["task"], record["test"]
    adapter, classifies = artifact == "adapter", task["kind"] == "classification"
    measured = [
        Measured(key, name, {**test[key], "n": _count(test[key] if "n" in test[key] else test)})
        for key, name in FIGURES.items()
        if key != OPTIMISTIC and test.get(key)
    ]
    pipeline = "text-classification" if classifies else "text-generation"
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        base_model=base_model,
        tags=["deepseek_v3", "mixture-of-experts", "lora" if recipe["method"] == "lora" else "fine-tuned"],
        model_name=_title(artifact, task),
        eval_results=results(pipeline, task["name"], "test", task["sha256"], measured) or None,
        **licence,
    )
    if base_model is not None:
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    return data


def _count(of: Mapping[str, Any]) -> str:
    return f"{of['n']} rows" + (f" in {of['n_groups']} groups" if "n_groups" in of else "")


def _title(artifact: str, task: Mapping[str, Any]) -> str:
    return f"{task['name']}: {'adapter' if artifact == 'adapter' else 'model'}"


def _fields(artifact: str, record: Mapping[str, Any], base_model: str | None) -> dict[str, str]:
    recipe, task, trainable = record["recipe"], record["task"], record["trainable"]
    how = {"lora": "LoRA", "full": "Full fine-tuning", "head": "A head on the frozen base"}[recipe["method"]]
    how = "QLoRA (NF4 base)" if recipe["quantize"] == "nf4" else how
    how += "" if recipe["unfreezing"] is None else " with progressive unfreezing"
    training = {
        "method": how,
        "trained": f"{trainable['trainable']:,} of {trainable['parameters']:,} parameters ({trainable['share']:.2%})",
        **({"targets": ", ".join(recipe["targets"]), "rank": recipe["rank"]} if recipe["method"] == "lora" else {}),
        "steps": f"{record['steps']:,} ({record['epochs']:.2f} epochs of {task['rows']['train']:,} rows, "
        f"{record['train_tokens']:,} tokens)",
        "learning rate": f"{record['learning_rate']:g}, {record['batch_size']:,} rows per step",
        "seed": recipe["seed"],
        "time": f"{record['train_seconds']:,.0f} s",
        "peak memory": f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "size": f"{record['artifacts'][artifact]['bytes'] / 1e6:,.1f} MB",
        **software(record["environment"], ("torch", "transformers", "peft")),
        "date": record["date"],
    }
    return {
        "title": _title(artifact, task),
        "what": f"{how} for the {task['kind']} task `{task['name']}`",
        "base": base_model or recipe["base"],
        "usage": _usage(task["labels"], artifact == "adapter", recipe["quantize"] == "nf4"),
        "data": f"{task['source']}. {task['rows']['train']:,} rows for training, {task['rows']['validation']:,} for "
        f"validation, {task['rows']['test']:,} for the test. Licence: {_data_licence(task)}. SHA-256: "
        f"`{task['sha256']}`.",
        "notes": "\n".join(f"- {note}" for note in [*task["notes"], *_classes(task["labels"])]),
        "training": table(training),
        "recipe": recipe_block(recipe),
        "rows": f"{record['test']['n']:,}",
        "seed": str(recipe["seed"]),
        "answers": _answers(record["test"].get("rouge_l") or {}),
        "unit": "groups" if "n_groups" in record["test"] else "rows",
        "results": _results(record),
        "better": _better(record),
        "threshold": _threshold(record["test"], task["labels"]),
        "forgetting": _forgetting(record["general_bits_per_byte"]),
        "movement": _movement(record["experts"]),
        "risks": _risks(task["name"]),
        "citation": CITATION,
    }


def _data_licence(task: Mapping[str, Any]) -> str:
    return task["licence"] or "as the source states"


def _licence(weights_licence: str | None, base_model: str | None, record: Mapping[str, Any]) -> str:
    weights = weights_licence or f"as those of `{base_model or record['recipe']['base']}`, which it was made from"
    return f"Weights: {weights}. Data: {_data_licence(record['task'])}."


def _classes(labels: Any) -> list[str]:
    return [f"classes, in the order of the logits: {'; '.join(labels)}"] if labels else []


def _usage(labels: Any, adapter: bool, nf4: bool) -> str:
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    lines = ["import deepseek_v3", f"from transformers import AutoTokenizer, {auto}", "", HERE]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(repository)"]
    if adapter:
        lines[1:1] = ["from peft import PeftConfig" if nf4 else "from peft import PeftConfig, PeftModel"]
        options, load = f", num_labels={len(labels)}" if labels else "", "PeftModel.from_pretrained"
        if nf4:  # PEFT's own loading would pass over the experts
            lines[1:1] = ["from deepseek_v3.finetuning import load_adapter"]
            lines[2:2] = ["from deepseek_v3.quantization import nf4_config"]
            options, load = f"{options}, quantization_config=nf4_config()", "load_adapter"
        lines += ["base = PeftConfig.from_pretrained(repository).base_model_name_or_path"]
        lines += [f"model = {auto}.from_pretrained(base{options})"]
        lines += ["model.config.pad_token_id = tokenizer.pad_token_id"] if labels else []
        lines += [f"model = {load}(model, repository)"]
    else:
        lines += [f"model = {auto}.from_pretrained(repository)"]
    lines += ['inputs = tokenizer("an example", return_tensors="pt", return_token_type_ids=False)']
    lines += [
        "print(model(**inputs).logits.softmax(-1))"
        if labels
        else "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
    ]
    return "\n".join(lines)


def _results(record: Mapping[str, Any]) -> str:
    rows = {"this model": record["test"], **record["baselines"]}
    names = [name for name in FIGURES if record["test"].get(name)]
    return grid(
        ["", *(FIGURES[name] for name in names)],
        [[who, *(figure_text(figures.get(name)) for name in names)] for who, figures in rows.items()],
    )


def _better(record: Mapping[str, Any]) -> str:
    """Which baselines did better in the first figure that they share with the model."""
    for name in ("accuracy", "rouge_l"):
        own = (record["test"].get(name) or {}).get("value")
        if own is not None:
            baselines = {who: found[name]["value"] for who, found in record["baselines"].items() if found.get(name)}
            return better_baselines(FIGURES[name], own, baselines, higher=True)
    return ""


def _answers(rouge: Mapping[str, Any]) -> str:
    if "n" not in rouge:
        return ""
    length = f" of up to {rouge['max_tokens']} tokens" if "max_tokens" in rouge else ""
    return f"; ROUGE-L on answers{length} to {rouge['n']:,} of them"


def _threshold(test: Mapping[str, Any], labels: Any) -> str:
    if "at_validation_recall" not in test:
        return ""
    at = test["at_validation_recall"]
    return (
        f"At the threshold {at['threshold']:.4g}, which finds {at['recall']:.0%} of the validation rows of class "
        f"`{labels[1]}`: sensitivity {figure_text(at['sensitivity'])}, specificity "
        f"{figure_text(at['specificity'])}, share of rows to review {figure_text(at['review_rate'])}.\n"
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
