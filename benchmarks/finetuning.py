"""Claim: what each way of fine-tuning reaches on four tasks, beside classical baselines.

    python benchmarks/finetuning.py --base outputs/smollm2-deepseek-v3 --shared data/ [--tasks T ...] [--methods M ...]
    python benchmarks/finetuning.py --table

One thread. A run that is in results/finetuning.jsonl is not repeated, and one that was interrupted goes on; several
calls may work side by side. `--shared` holds the folders financial_phrasebank/ and pubmedqa_pqal/ of these data sets.
Of German credit, seed s takes fold s for the test. Of ICD-10, 4,000 rows of each split are taken, for the baselines
too. Figures of the table: mean over seeds with Student's t interval.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from common import RESULTS, write_results

OUTPUT = Path("outputs/benchmark-finetuning")
FILE = RESULTS / "finetuning.jsonl"
TASKS: dict[str, dict[str, Any]] = {
    "german-credit": {"epochs": 2, "max_length": 256, "batch_size": 16, "learning_rate": 3e-4},
    "icd10-chapter": {"epochs": 4, "max_length": 64, "batch_size": 32, "learning_rate": 5e-4, "limit": 4000},
    "financial-phrasebank": {"epochs": 2, "max_length": 128, "batch_size": 16, "learning_rate": 5e-4},
    "pubmedqa": {"epochs": 2, "max_length": 448, "batch_size": 8, "learning_rate": 3e-4},
}
# Progressive unfreezing reaches three layers further down after this many steps.
STAGE_STEPS = {"german-credit": 10, "icd10-chapter": 60, "financial-phrasebank": 60, "pubmedqa": 11}
FOLDERS = {"financial-phrasebank": "financial_phrasebank", "pubmedqa": "pubmedqa_pqal"}
LORA = {"method": "lora", "rank": 8}
METHODS: dict[str, dict[str, Any]] = {
    "frozen base, head": {"method": "head", "learning_rate": 1e-3, "epochs": 20},
    "LoRA attention": {**LORA, "targets": ["attention"]},
    "LoRA + experts": {**LORA, "targets": ["attention", "experts"]},
    "QLoRA": {**LORA, "targets": ["attention", "experts"], "quantize": "nf4"},
    "progressive": {"method": "full", "learning_rate": 1e-4},
}
FIGURES = ("accuracy", "macro_f1", "roc_auc", "ece", "mean_cost")


def recipe(task: str, method: str, seed: int, base: str, shared: str) -> dict[str, Any]:
    fields = TASKS[task] | METHODS[method]
    name = f"{task}_{method}_{seed}".replace(" ", "-").replace(",", "").replace("+", "and")
    fields |= {"base": base, "task": task, "seed": seed, "output_dir": str(OUTPUT / name)}
    fields |= {"compare": False, "merge": False, "general_text": "stdlib", "validation_rows": 500}
    if task == "german-credit":
        fields["task_options"] = {"fold": seed}
    if task in FOLDERS:
        fields["data"] = str(Path(shared) / FOLDERS[task])
    if fields["method"] == "full":
        fields["unfreezing"] = {"advance": "steps", "every": STAGE_STEPS[task]}
    return fields


def done() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def measured(row: dict[str, Any]) -> tuple[str, str, int, str | None]:
    """What tells a run from the others; baselines have no base."""
    return row["task"], row["method"], row["seed"], row.get("base")


def sha256(base: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(base).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(task: str, method: str, seed: int, args: argparse.Namespace, weights: str) -> None:
    import torch

    torch.set_num_threads(1)
    from deepseek_v3.finetuning import FinetuneRecipe, finetune

    chosen = FinetuneRecipe(**recipe(task, method, seed, args.base, args.shared))
    record = finetune(chosen)
    figures = {name: record["test"][name] for name in FIGURES if name in record["test"]}
    write_results(
        "finetuning",
        [
            {
                "task": task,
                "method": method,
                "seed": seed,
                "n": record["test"]["n"],
                **figures,
                "rows": record["task"]["rows"],
                "steps": record["steps"],
                "trainable": record["trainable"]["trainable"],
                "train_seconds": record["train_seconds"],
                "peak_mib": record["peak_memory_bytes"] // 2**20,
                "general_bits_per_byte": record["general_bits_per_byte"],
                "base": weights,
                "git": record["environment"].get("git"),
            }
        ],
    )
    for folder in ("adapter", "model"):
        shutil.rmtree(Path(chosen.output_dir) / folder, ignore_errors=True)


def run_baselines(task: str, seed: int, args: argparse.Namespace) -> None:
    from deepseek_v3.finetuning.baselines import classification_baselines
    from deepseek_v3.finetuning.evaluate import classification_results
    from deepseek_v3.finetuning.tasks import load_task

    data = str(Path(args.shared) / FOLDERS[task]) if task in FOLDERS else None
    options = {"fold": seed} if task == "german-credit" else {}
    rows = load_task(task, data, limit=TASKS[task].get("limit"), **options)
    found = []
    for baseline in classification_baselines(rows, seed):
        results = classification_results(rows, baseline.validation, baseline.test)
        figures = {name: results[name] for name in FIGURES if name in results}
        found.append({"task": task, "method": baseline.name, "seed": seed, "n": results["n"], **figures})
    write_results("finetuning", found)


def table() -> None:
    """Markdown: a block for each task."""
    from deepseek_v3.finetuning.reports import over_seeds

    rows = done()
    for task in TASKS:
        print(f"\n{task}\n\n| | seeds | accuracy | macro-F1 | ROC AUC | ECE | general text, bits per byte |")
        print("|---|---|---|---|---|---|---|")
        for method, base in dict.fromkeys((row["method"], row.get("base")) for row in rows if row["task"] == task):
            found = [r for r in rows if (r["task"], r["method"], r.get("base")) == (task, method, base)]
            cells = []
            for name in FIGURES[:4]:
                values = [row[name]["value"] for row in found]
                estimate = over_seeds(values) if len(values) > 1 else None
                only = found[0][name]
                low, high = (estimate.low, estimate.high) if estimate else (only["low"], only["high"])
                cells.append(f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}]")
            bits = [row["general_bits_per_byte"] for row in found if row.get("general_bits_per_byte")]
            change = f"{bits[0]['before']:.3f} → {sum(b['after'] for b in bits) / len(bits):.3f}" if bits else ""
            print(f"| {method} | {len(found)} | {' | '.join(cells)} | {change} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="outputs/smollm2-deepseek-v3")
    parser.add_argument("--shared", default="data")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "baselines"], default=["baselines", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what was measured so far")
    args = parser.parse_args()
    if args.table:
        table()
        return
    weights = sha256(args.base) if args.methods != ["baselines"] else ""
    for seed in args.seeds:
        for task in args.tasks:
            for method in args.methods:
                present = {measured(row) for row in done()}
                if method == "baselines":
                    if (task, "majority", seed, None) not in present and (seed == 0 or task == "german-credit"):
                        run_baselines(task, seed, args)
                elif (task, method, seed, weights) not in present:
                    try:
                        run(task, method, seed, args, weights)
                    except ValueError as error:
                        if "in use by another run" not in str(error):
                            raise
                        print(error)


if __name__ == "__main__":
    main()
