"""The card of an export, from its report `export.json` and from `verify.json`: a missing figure is an error."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration.local_paths import public_name
from ..modeling_deepseek_v3.weight_files import read_json
from .card import (
    CITATION,
    HERE,
    Measured,
    architecture,
    grid,
    licence_fields,
    licence_name,
    read_config,
    render,
    results,
    software,
    source_card,
    table,
    write_card,
)

FORMATS = {
    "bf16": "official layout, {dtype}",
    "fp8": "DeepSeek's FP8 (E4M3) in blocks of 128 x 128",
    "int4": "compressed-tensors W4A16, groups of {group_size}",
    "int8": "compressed-tensors W8A8, INT8",
    "nf4": "bitsandbytes NF4",
    "bnb-int8": "bitsandbytes LLM.int8()",
    "gguf": "GGUF {quantization}, architecture deepseek2",
}
AS_IT_WAS = "bf16"  # the one format that quantizes nothing
# head of the architecture -> auto class and task
HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
}
Figure = Mapping[str, Any]


def write_export_card(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    base_model: str | None = None,
    weights_licence: str | None = None,
) -> Path:
    """Write `README.md` for the export in `folder`, which holds `export.json` and `verify.json`. One that was
    changed is kept.

    Args:
        source: the folder that it was made from; its card, if there is a valid one, gives the licence, the
            limitations and, for an export that quantizes nothing, the base.
        base_model: the source's repository on the Hub; without it the front matter names no base, and `push` asks for
            it where one is needed.
        weights_licence: None takes that of the source's card.

    Raises:
        ValueError: `folder` is no export that was verified, or a record lacks a field that the card states (named).
    """
    folder = Path(folder)
    report, verified = _record(folder, "export.json", "export"), _record(folder, "verify.json", "verify")
    original = source_card(Path(source)) if source else None
    licence = licence_fields(weights_licence, original)
    try:
        auto, task = _head(folder)
        data = _front_matter(report, verified, task, base_model, licence, original)
        fields = _fields(folder, report, verified, auto) | {
            "base": base_model or report["source"]["name"],
            "limitations": _limitations(original),
            "licence": f"Weights: {licence_name(licence) or 'as those of the original'}.",
        }
    except KeyError as error:
        raise ValueError(f"model card of {folder}: export.json and verify.json have no field {error}") from None
    return write_card(folder, render("export_card.md", folder, data, fields))


def _record(folder: Path, name: str, command: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: not found; `deepseek-v3 {command}` writes it, and the card needs it")
    record = read_json(folder / name)
    if not isinstance(record, dict):
        raise ValueError(f"{folder / name}: found {type(record).__name__}, allowed is an object")
    return record


def _head(folder: Path) -> tuple[str, str]:
    """The auto class that loads the export, and what it is for."""
    if not (folder / "config.json").is_file():  # a GGUF file holds its own
        return HEADS["ForCausalLM"]
    architectures = read_config(folder).architectures
    for head, found in HEADS.items():
        if architectures and architectures[0].endswith(head):
            return found
    allowed = ", ".join(f"...{head}" for head in HEADS)
    raise ValueError(f"{folder / 'config.json'}: architectures is {architectures!r}, allowed is one of {allowed}")


def _front_matter(
    report: Mapping[str, Any],
    verified: Mapping[str, Any],
    task: str,
    base_model: str | None,
    licence: Mapping[str, Any],
    original: ModelCard | None,
) -> ModelCardData:
    gguf = report["format"] == "gguf"
    base_model, relation = _base(report, base_model, original)
    entries = []
    if "kl" in verified:
        text = verified["text"]
        measured = [
            Measured("kl_divergence", "KL(original || this), nats per token", verified["kl"]),
            Measured("top1_agreement", "share of tokens with the original's top prediction", verified["top1"]),
            Measured("bits_per_byte", "bits per byte", verified["bits_per_byte"]["export"]),
        ]
        entries = results("text-generation", public_name(text["name"]), "held-out", text["sha256"], measured)
    data = ModelCardData(
        library_name="gguf" if gguf else "transformers",
        pipeline_tag=task,
        base_model=base_model,
        tags=["deepseek_v3", "mixture-of-experts", report["format"]],
        model_name=_title(report),
        eval_results=entries or None,
        **licence,
    )
    if base_model is not None and relation is not None:
        data["base_model_relation"] = relation
    return data


def _base(
    report: Mapping[str, Any], base_model: str | None, original: ModelCard | None
) -> tuple[str | None, str | None]:
    """The base's repository, and what the export is to it."""
    if report["format"] != AS_IT_WAS:
        return base_model, "quantized"
    relation = None
    if base_model is None and original is not None:
        base_model, relation = (original.data.get(name) for name in ("base_model", "base_model_relation"))
    if report["source"]["adapter"] is not None:
        return base_model, "finetune"
    return base_model, None if relation in ("adapter", "quantized") else relation  # the source was, this is not


def _title(report: Mapping[str, Any]) -> str:
    adapter = report["source"]["adapter"]
    name = report["source"]["name"] if adapter is None else f"{report['source']['name']} + {adapter['name']}"
    return f"{name}, {report['format']}"


def _fields(folder: Path, report: Mapping[str, Any], verified: Mapping[str, Any], auto: str) -> dict[str, str]:
    options, quantized, form = report["options"], report["quantized"], report["format"]
    what = FORMATS[form].format_map(options)
    rows = {
        "format": what,
        "options": _listed(options) or "none",
        "parameters": f"{report['parameters']:,}",
        "size": f"{report['bytes']:,} bytes, {report['bytes_per_parameter']:.3f} per parameter",
    }
    if quantized["parameters"]:
        rows["quantized"] = (
            f"{quantized['share']:.1%} of the parameters, in {quantized['bytes']:,} bytes "
            f"({quantized['bytes'] / quantized['bytes_in_bf16']:.1%} of bf16's)"
        )
    made = {
        **software(report["environment"]),
        "time and memory": f"{report['seconds']:,.0f} s, {report['peak_memory_bytes'] / 2**20:,.0f} MiB at most",
    }
    adapter = report["source"]["adapter"]
    hashes = {**report["source"]["files"], **({} if adapter is None else adapter["files"])}
    shape = ""
    if (folder / "config.json").is_file():  # a GGUF file holds its own
        shape = f"## Architecture\n\n{grid(['', ''], architecture(read_config(folder)).items())}"
    return {
        "title": _title(report),
        "what": what[0].upper() + what[1:],
        "usage": _usage(report, auto),
        "format": table(rows),
        "architecture": shape,
        "fidelity": _fidelity(verified),
        "tensors": _tensors(verified["tensors"]),
        "verdict": _verdict(verified),
        "made": table(made),
        "calibration": _calibration(report["calibration"]),
        "source": grid(["file", "SHA-256"], [[f"`{name}`", f"`{digest}`"] for name, digest in hashes.items()]),
        "citation": CITATION,
    }


def _usage(report: Mapping[str, Any], auto: str) -> str:
    if report["format"] == "gguf":
        name = sorted(name for name in report["files"] if name.endswith(".gguf"))[0]
        return f'```bash\nllama-cli --model {name} --prompt "def main("\n```'
    lines = ["import deepseek_v3", f"from transformers import {auto}, AutoTokenizer", "", HERE]
    lines += [f"model = {auto}.from_pretrained(repository)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(repository)"]
    lines += ['inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)']
    if auto == "AutoModelForCausalLM":
        lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"]
    else:
        lines += ["print(model(**inputs).logits)"]
    code = "\n".join(lines)
    return f"```python\n{code}\n```"


def _fidelity(verified: Mapping[str, Any]) -> str:
    """The table of what `deepseek-v3 verify` found."""
    if "kl" not in verified:
        return "Tensors only were compared, not the predictions."
    text, bits, speed = verified["text"], verified["bits_per_byte"], verified["decode_tokens_per_second"]
    both = (f"{speed['reference']:.1f}", "-" if speed["export"] is None else f"{speed['export']:.1f}")
    rows = [
        ["KL(original ‖ this), nats per token", "0", _figure(verified["kl"], ".6f")],
        ["same top prediction", "100 %", _figure(verified["top1"], ".2%")],
        ["bits per byte", _figure(bits["reference"], ".4f"), _figure(bits["export"], ".4f")],
        ["bits per byte, difference", "0", _figure(bits["delta"], "+.5f")],
        ["perplexity, change", "0 %", _figure(verified["perplexity_change"], "+.3%")],
    ]
    if acceptance := verified["mtp_acceptance"]:
        rows.append(["MTP drafts accepted", *(_figure(acceptance[key], ".1%") for key in ("reference", "export"))])
    elif verified["mtp_left_out"]:
        rows.append(["MTP layers", "there", "left out"])
    rows.append([f"decoding, tokens per second ({verified['speed']['clock']})", *both])
    size = verified["bytes"]
    rows.append(["bytes of the weights", f"{size['reference']:,}", f"{size['export']:,}"])
    return (
        f"Both models on {text['tokens']:,} tokens of {public_name(text['name'])} (SHA-256 `{text['sha256']}`), in "
        f"{text['rows']:,} rows of {text['length']:,}, seed {text['seed']}, with {verified['weights']} weights; 95 % "
        f"intervals over the rows (MTP: over the prompts) in brackets:\n\n"
        f"{grid(['', 'original', 'this export'], rows)}"
    )


def _figure(figure: Figure, form: str) -> str:
    if figure["value"] is None:
        return "undefined"
    if figure["low"] is None:
        return format(figure["value"], form)
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def _tensors(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [kind, row["tensors"], f"{row['parameters']:,}", f"{row['relative_error']:.2e}", f"{row['largest']:.2e}"]
        for kind, row in kinds.items()
    ]
    return grid(["kind", "tensors", "parameters", "error of all", "largest of one"], rows)


def _verdict(verified: Mapping[str, Any]) -> str:
    failures, measured = verified["failures"], f"Measured with `deepseek-v3 verify` on {verified['date']}"
    if not failures:
        return f"{measured}; all within its thresholds."
    return "\n".join([f"{measured}; past its thresholds:", "", *(f"- {failure}" for failure in failures)])


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "No calibration text was used."
    return f"Calibration: {_listed(calibration)}."


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {public_name(str(value))}" for name, value in values.items())


def _limitations(original: ModelCard | None) -> str:
    """That section of the original's card."""
    found = None if original is None else re.search(r"^## Limitations\n(.*?)(?=^## |\Z)", original.text, re.M | re.S)
    return f"The original's card says:\n\n{found[1].strip()}" if found else ""
