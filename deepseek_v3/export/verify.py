"""`verify`: whether an export still is the model that it was made from, in figures and against thresholds."""

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..configuration import DeepseekV3Config
from ..durable import write_json
from ..evaluation.speed import mtp_acceptance, throughput
from ..evaluation.text import LENGTH, TextRows, read_text, text_rows
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..process import environment, say
from ..tokenization import DeepseekV3Tokenizer, check_vocab
from .fidelity import Tensors, compare_logits, coverage, reference_states, tensor_errors
from .source import Source
from .steps import ROUTING_BIAS

RECORD = "verify.json"
ROUNDING = 0.004  # largest relative error of any tensor that the export does not quantize: one of 16 bits
# fields of config.json that may differ: how the weights are stored, and what transformers notes of a load
STORAGE_FIELDS = ("dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Thresholds:
    """Past these an export fails.

    Attributes:
        relative_error: largest error of a kind of tensor; `ROUNDING` holds for each that the export does not quantize.
        kl: largest mean KL(reference || export), nats per token.
        top1: smallest share of equal top predictions.
        perplexity: largest relative rise.
        mtp: largest absolute fall of the acceptance of MTP drafts.
        tensor: largest error of any one tensor, which in a kind of thousands would not show. Honest ones of 4 bits are
            below 0.2; it is 1 for a tensor of zeros.
    """

    relative_error: float
    kl: float
    top1: float
    perplexity: float
    mtp: float = 0.1
    tensor: float = 0.5


# Of trained models of some 10 million parameters, the hardest case: larger ones lose less by the same rounding.
HALF = Thresholds(ROUNDING, 2e-3, 0.97, 0.002)
EIGHT = Thresholds(0.015, 5e-3, 0.96, 0.003)
FOUR = Thresholds(0.15, 0.03, 0.90, 0.02)
DEFAULTS = {
    "bf16": HALF,
    "fp8": Thresholds(0.04, 5e-3, 0.96, 0.003),
    "int8": EIGHT,
    "bnb-int8": EIGHT,
    "int4": Thresholds(0.2, 0.03, 0.90, 0.01),
    "nf4": FOUR,
    "gguf": FOUR,
}


def verify(
    folder: str | Path,
    against: str | Path,
    *,
    adapter: str | Path | None = None,
    text: str = "stdlib",
    rows: int | None = 64,
    length: int = LENGTH,
    seed: int = 0,
    weights: Literal["packed", "dequantized"] = "packed",
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """Compare an export with the checkpoint it was made from, and write `verify.json` beside its weights.

    Every figure of two exports is comparable if text, rows, length and seed are the same. Models compute in fp32 on a
    CPU and in bf16 on a GPU.

    Args:
        folder: an export of any format, a folder or a ``.gguf`` file.
        against: the checkpoint, or the PEFT adapter, that it was made from.
        adapter: the PEFT adapter that was merged into that checkpoint.
        text: what to score, as `evaluation.read_text` takes it; `rows` of `length` tokens of it, drawn by `seed`.
        weights: "packed" runs the export as `from_pretrained` loads it, quantized activations included; "dequantized"
            runs plain matrices of the same weights, as it always does for GGUF.
        thresholds: None takes those of the format.

    Returns:
        The record, JSON-ready: `coverage`, `config` (fields that differ), `tensors` (errors by kind), `kl`, `top1`,
        `bits_per_byte`, `perplexity_change`, `mtp_acceptance`, `decode_tokens_per_second`, `bytes`,
        `bytes_per_parameter`, and `failures`: what is past a threshold, in words. Where tensors are missing or not
        finite, and for classifiers, no logits are compared. `mtp_left_out`: whether the export is a GGUF file without
        the reference's MTP layers, as `mtp=False` writes it. That is no failure, and they enter no figure of it.

    Raises:
        ValueError: a folder that is no checkpoint, a reference without tokenizer, with one that has more tokens than
            the model, or with numbers that are not finite; names the file, field or tensor.
    """
    logging.disable_progress_bar()
    reference = Source(against, adapter)
    export, where = _open(Path(folder))
    form = _format(export)
    limits = thresholds or DEFAULTS[form]
    tokenizer = None
    if "score.weight" not in reference.names:
        if reference.tokenizer_folder is None:
            raise ValueError(f"{reference.no_tokenizer()}, which the comparison of logits needs")
        tokenizer = DeepseekV3Tokenizer.from_pretrained(reference.tokenizer_folder)
        check_vocab(tokenizer, reference.config.vocab_size)
    made_from = _name(against) if adapter is None else f"{_name(against)} + {_name(adapter)}"
    report: dict[str, Any] = {"export": _name(folder), "against": made_from, "format": form}
    parameters = {"reference": _parameters(reference)}
    depths = [source.config.num_nextn_predict_layers for source in (reference, export)]
    report["mtp_left_out"] = form == "gguf" and depths[0] > 0 == depths[1]
    if report["mtp_left_out"]:
        reference.leave_out_mtp()
    parameters["export"] = _parameters(reference)
    say("comparing tensors")
    report["coverage"] = found = coverage(export, reference)
    # GGUF metadata hold what the forward pass needs; whether that is right, the logits show
    report["config"] = {} if form == "gguf" else _config_differences(export.config, reference.config)
    different = {*found["missing"], *(line.split(":")[0] for line in found["other_shape"])}
    names = [name for name in reference.names if name not in different]
    report["tensors"], report["non_finite_tensors"] = tensor_errors(export, reference, names)
    report["parameters"] = parameters["export"]
    report["bytes"] = {"reference": _weight_bytes(reference.folder), "export": _weight_bytes(Path(folder))}
    report["bytes_per_parameter"] = {key: size / parameters[key] for key, size in report["bytes"].items()}

    if tokenizer is not None and not different and not report["non_finite_tensors"]:
        length = min(length, reference.config.max_position_embeddings)
        drawn = text_rows(read_text(text), tokenizer, length, rows, seed)
        report["text"] = {**drawn.describe(), "seed": seed}
        packed = weights == "packed" and isinstance(export, Source)
        report["weights"] = "packed" if packed else "dequantized"
        report |= _compare_models(reference, export, packed, drawn)
    report |= {"environment": environment(_device()), "date": time.strftime("%Y-%m-%d")}
    report |= {"thresholds": asdict(limits), "failures": _failures(report, limits)}
    write_json(where / RECORD, report, allow_nan=False)
    return report


def _open(path: Path) -> tuple[Tensors, Path]:
    """The tensors of an export, and the folder that they lie in."""
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not files:
        return Source(path), path
    if len(files) > 1:
        raise ValueError(f"{path}: found {len(files)} GGUF files; name one of them")
    from .gguf import read_gguf

    return read_gguf(files[0]), files[0].parent


def _name(path: str | Path) -> str:
    """Its last part, also where that is "." or "..". The file of a Hub cache is a link to one named by its hash."""
    return (Path(path).resolve() if Path(path).is_dir() else Path(path)).name


def _format(export: Tensors) -> str:
    """The format's name by what the export itself says; a key of `DEFAULTS`. Of 4 and 8 bits together: that of 4."""
    if not isinstance(export, Source):
        return "gguf"
    match export.quantization:
        case None:
            return "bf16"
        case {"quant_method": "compressed-tensors", "config_groups": groups}:
            return "int4" if any(group["weights"]["num_bits"] == 4 for group in groups.values()) else "int8"
        case {"quant_method": "bitsandbytes", "load_in_4bit": True}:
            return "nf4"
        case {"quant_method": "bitsandbytes"}:
            return "bnb-int8"
    return "fp8"


def _config_differences(export: DeepseekV3Config, reference: DeepseekV3Config) -> dict[str, list[Any]]:
    """Field -> its value in the reference and in the export."""
    before, after = reference.to_dict(), export.to_dict()
    names = sorted({*before, *after} - set(STORAGE_FIELDS))
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def _parameters(source: Source) -> int:
    counted = [name for name in source.names if not name.endswith(ROUTING_BIAS)]
    return sum(torch.Size(source.shape(name)).numel() for name in counted)


def _weight_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".safetensors", ".gguf")]
    return sum(file.stat().st_size for file in files)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _compare_models(reference: Source, export: Tensors, packed: bool, rows: TextRows) -> dict[str, Any]:
    """The figures of both models, one after the other; of the reference's, only its last states stay."""
    dtype = torch.float32 if _device().type == "cpu" else torch.bfloat16
    prompts = rows.prompts()

    def measure(model: DeepseekV3ForCausalLM) -> tuple[Any, dict[str, Any]]:
        return mtp_acceptance(model, prompts), throughput(model, prompts[0])

    say(f"scoring {len(rows.chosen)} rows of {rows.text.name} with the reference")
    model = _load(reference, reference.adapter is None, dtype)
    states = reference_states(model, rows)
    mtp_before, speed_before = measure(model)
    del model
    gc.collect()
    say("scoring them with the export")
    model = _load(export, packed, dtype)
    figures = compare_logits(model, states, rows)
    if "non_finite" in figures:
        return {"non_finite_logits": figures["non_finite"]}
    mtp, speed = measure(model)
    key = "decode_tokens_per_second"
    return {
        **figures,
        "mtp_acceptance": None if mtp is None else {"reference": mtp_before, "export": mtp},
        # of plain matrices: says nothing of the export's own speed
        key: {"reference": speed_before[key], "export": speed[key] if packed else None},
        "speed": {name: speed[name] for name in ("clock", "threads", "dtype")},
    }


class _Lazy:
    """An official tensor that is read when transformers puts it into the model; reads like a safetensors slice."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def get_shape(self) -> list[int]:
        return list(self._tensors.shape(self._name))

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensors.read(self._name)[index]


def _load(tensors: Tensors, as_stored: bool, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    if as_stored:
        assert isinstance(tensors, Source)
        folder, options = tensors.folder, {}
    else:
        state_dict = {name: _Lazy(tensors, name) for name in tensors.names}
        folder, options = None, {"config": tensors.config, "state_dict": state_dict}
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": _device()}, **options).eval()


def _failures(report: Mapping[str, Any], limits: Thresholds) -> list[str]:
    """What is past a threshold, in words."""
    found = [
        f"{len(report['coverage'][key])} {key} tensors: {', '.join(report['coverage'][key][:3])}"
        for key in ("missing", "unexpected", "other_shape")
        if report["coverage"][key]
    ]
    found += [f"config: {name} is {after!r}, was {before!r}" for name, (before, after) in report["config"].items()]
    if names := report["non_finite_tensors"]:
        found.append(f"{len(names)} tensors that are not finite, the first {names[0]}")
    for kind, row in report["tensors"].items():
        if row["largest_plain"] > ROUNDING:
            which = f"{row['largest_plain_tensor']}, which is not quantized"
            error, limit = row["largest_plain"], ROUNDING
        elif row["relative_error"] > limits.relative_error:
            which, error, limit = "the tensors", row["relative_error"], limits.relative_error
        elif row["largest"] > limits.tensor:
            which, error, limit = row["largest_tensor"], row["largest"], limits.tensor
        else:
            continue
        found.append(f"{kind}: relative error {error:.4g} of {which}, at most {limit:g}")
    if "non_finite_logits" in report:
        found.append(f"logits are not finite, from {report['non_finite_logits']} on")
    if "kl" not in report:
        return found
    figures = {
        "KL": (report["kl"]["value"], limits.kl),
        "relative change of perplexity": (report["perplexity_change"]["value"], limits.perplexity),
        "share of other top predictions": (1 - report["top1"]["value"], 1 - limits.top1),
    }
    if report["mtp_acceptance"]:
        # None: no draft was made, as the first token ended every text
        shares = [report["mtp_acceptance"][key]["value"] or 0.0 for key in ("reference", "export")]
        figures["fall of the MTP acceptance"] = (shares[0] - shares[1], limits.mtp)
    past = {name: (value, limit) for name, (value, limit) in figures.items() if value > limit}
    return found + [f"{name}: {value:.4g}, at most {limit:.4g}" for name, (value, limit) in past.items()]


def verify_table(report: Mapping[str, Any]) -> str:
    """The record as text to print."""
    found, broken = report["coverage"], report["non_finite_tensors"]
    lines = [
        f"{report['export']} ({report['format']}) against {report['against']}",
        f"tensors: {found['tensors']} in both, {len(found['missing'])} missing, {len(found['unexpected'])} more, "
        f"{len(found['other_shape'])} of another shape, {len(broken)} not finite",
        f"{'relative error':<18}{'tensors':>8}{'parameters':>16}{'all':>11}{'largest':>11}  of",
    ]
    for kind, row in report["tensors"].items():
        name = row.get("largest_tensor", "")
        counts = f"{kind:<18}{row['tensors']:>8}{row['parameters']:>16,}"
        lines.append(f"{counts}{row['relative_error']:>11.2e}{row['largest']:>11.2e}  {name}")
    size, rate = report["bytes"], report["bytes_per_parameter"]
    lines.append(f"bytes: {size['export']:,} of {size['reference']:,}, {rate['export']:.3f} per parameter")
    if report["mtp_left_out"]:
        lines.append("MTP left out: the file does not have those layers, and none of their tensors was compared")
    if "kl" in report:
        text, bits = report["text"], report["bits_per_byte"]
        lines += [
            f"{text['tokens']:,} tokens of {text['name']}, {report['weights']} weights:",
            _line("KL(reference || export)", report["kl"], "{:.6f}"),
            _line("top-1 agreement", report["top1"], "{:.4f}"),
            _line("bits per byte, before", bits["reference"], "{:.4f}"),
            _line("bits per byte, after", bits["export"], "{:.4f}"),
            _line("  difference", bits["delta"], "{:+.5f}"),
            _line("perplexity, change", report["perplexity_change"], "{:+.3%}"),
        ]
        if acceptance := report["mtp_acceptance"]:
            lines += [_line(f"MTP acceptance, {key}", acceptance[key], "{:.3f}") for key in ("reference", "export")]
        for key, value in report["decode_tokens_per_second"].items():
            if value is not None:
                lines.append(f"  {'decode, ' + key:<28}{value:.1f} tokens/s ({report['speed']['clock']})")
    return "\n".join([*lines, *(f"FAILED {failure}" for failure in report["failures"])])


def _line(name: str, figure: Mapping[str, Any], form: str) -> str:
    value, low, high = ("-" if figure[key] is None else form.format(figure[key]) for key in ("value", "low", "high"))
    return f"  {name:<28}{value} [{low}, {high}], n = {figure['n']} rows"
