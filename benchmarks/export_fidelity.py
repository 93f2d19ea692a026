"""Claim: what each export format costs in fidelity, and saves in bytes, on one trained model.

    python benchmarks/export_fidelity.py --model outputs/export-base/model [--only NAME ...] [--rows N]
    python benchmarks/export_fidelity.py --table

One thread, fp32 arithmetic, the same held-out rows for every format. Formats that look at calibration text are made
with three seeds of it. A row that is in results/export_fidelity.jsonl is not measured again, and an export that was
interrupted goes on. Of GGUF the weights are measured, in our model; its speed is llama.cpp's affair.
"""

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS, write_results

OUTPUT = Path("outputs/benchmark-export")
NAME = "export_fidelity"
FILE = RESULTS / f"{NAME}.jsonl"
# name -> format and its options
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "fp8": ("fp8", {}),
    "fp8, ue8m0 scales": ("fp8", {"power_of_two": True}),
    "int8, experts": ("int8", {"targets": "experts"}),
    "int8, linears": ("int8", {"targets": "linears"}),
    "int4 rtn": ("int4", {"method": "rtn"}),
    "int4 mse": ("int4", {"method": "mse"}),
    "int4 gptq": ("int4", {"method": "gptq"}),
    "int4 learned": ("int4", {"method": "learned"}),
    "int4 rtn, linears": ("int4", {"method": "rtn", "targets": "linears"}),
    "int4 gptq, linears": ("int4", {"method": "gptq", "targets": "linears"}),
    "nf4": ("nf4", {}),
    "bnb-int8": ("bnb-int8", {}),
    "gguf Q8_0": ("gguf", {"quantization": "Q8_0"}),
    "gguf Q6_K": ("gguf", {"quantization": "Q6_K"}),
    "gguf Q5_0": ("gguf", {"quantization": "Q5_0"}),
    "gguf Q4_K_M": ("gguf", {"quantization": "Q4_K_M"}),
    "gguf Q4_0": ("gguf", {"quantization": "Q4_0"}),
}
SEEDS = {"gptq": (0, 1, 2), "learned": (0, 1, 2)}  # of the calibration text, by method


def done() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def measure(name: str, seed: int, model: Path, rows: int, source: str) -> None:
    from deepseek_v3.export import export
    from deepseek_v3.export.verify import verify, verify_table

    form, options = FORMATS[name]
    if options.get("method") in SEEDS:
        options = options | {"seed": seed}
    folder = OUTPUT / f"{name}-{seed}".replace(" ", "-").replace(",", "")
    made = export(model, folder, form, progress=False, **options)
    report = verify(folder, model, rows=rows)
    print(verify_table(report), flush=True)
    bits, acceptance = report["bits_per_byte"], report["mtp_acceptance"]
    quantized = made["quantized"]
    row = {
        "format": name,
        "seed": seed,
        "source": source,
        "text": report["text"],
        "weights": report["weights"],
        "kl": report["kl"],
        "top1": report["top1"],
        "bits_per_byte": bits,
        "perplexity_change": report["perplexity_change"],
        "mtp_acceptance": acceptance,
        "relative_error": {kind: error["relative_error"] for kind, error in report["tensors"].items()},
        "bytes": report["bytes"]["export"],
        "bytes_per_parameter": report["bytes_per_parameter"]["export"],
        "quantized_share": quantized["share"],
        "quantized_bytes_of_bf16": quantized["bytes"] / quantized["bytes_in_bf16"] if quantized["bytes"] else None,
        "decode_tokens_per_second": report["decode_tokens_per_second"],
        "export_seconds": made["seconds"],
        "failures": report["failures"],
    }
    write_results(NAME, [row])


def table() -> None:
    """Markdown. Where there are several seeds: their mean, and the lowest and highest."""
    rows = done()
    newest = {(row["format"], row["seed"], row["source"]): row for row in rows}
    chosen = [row for row in newest.values() if row["source"] == rows[-1]["source"]]
    text, first = chosen[0]["text"], chosen[0]["bits_per_byte"]["reference"]
    print(f"{text['name']}: {text['tokens']:,} tokens in {text['rows']} rows of {text['length']}; the model itself:")
    print(f"{first['value']:.4f} bits per byte [{first['low']:.4f}, {first['high']:.4f}]\n")
    print("| | KL, 1e-3 nats | top-1 | bits per byte | perplexity | MTP accepted | bytes per parameter | ", end="")
    print("quantized part, of bf16 | decode, tokens/s, and the model's |\n|---|---|---|---|---|---|---|---|---|")
    for name in FORMATS:
        group = [row for row in chosen if row["format"] == name]
        if not group:
            continue
        speed = group[-1]["decode_tokens_per_second"]  # of one process: compare the two, not the rows
        part = group[0]["quantized_bytes_of_bf16"]
        cells = [
            _over_seeds([1000 * row["kl"]["value"] for row in group], "{:.3f}"),
            _over_seeds([row["top1"]["value"] for row in group], "{:.2%}"),
            _over_seeds([row["bits_per_byte"]["delta"]["value"] for row in group], "{:+.4f}"),
            _over_seeds([row["perplexity_change"]["value"] for row in group], "{:+.2%}"),
            _over_seeds([row["mtp_acceptance"]["export"]["value"] for row in group], "{:.1%}"),
            f"{group[0]['bytes_per_parameter']:.3f}",
            "" if part is None else f"{part:.1%}",
            "" if speed["export"] is None else f"{speed['export']:.0f} of {speed['reference']:.0f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _over_seeds(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("outputs/export-base/model"))
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--table", action="store_true", help="print what is measured, as Markdown")
    args = parser.parse_args()
    if args.table:
        return table()
    import torch

    torch.set_num_threads(1)
    source = sha256(args.model)
    there = {(row["format"], row["seed"], row["source"], row["text"]["rows"]) for row in done()}
    for name in args.only:
        for seed in SEEDS.get(FORMATS[name][1].get("method", ""), (0,)):
            if (name, seed, source, args.rows) not in there:
                measure(name, seed, args.model, args.rows, source)
    table()


if __name__ == "__main__":
    main()
