"""Recipes: those in examples/ load, defaults follow from method and preset, and every bad field is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_v3.finetuning import TASKS, FinetuneRecipe, Unfreezing
from deepseek_v3.finetuning.recipe import NO_OPTIONS
from deepseek_v3.finetuning.unfreezing import PRESETS

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"base": "a", "task": "b", "output_dir": "c"}
FILES = [path for path in sorted((ROOT / "examples/recipes").glob("*.yaml")) if "base" in yaml.safe_load(path.open())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_examples_load(path: Path) -> None:
    recipe = FinetuneRecipe.load(path)
    written = yaml.safe_load(path.read_text())
    assert {name: getattr(recipe, name) for name in written} == written
    assert recipe.task in TASKS or recipe.task.endswith(".jsonl")
    assert recipe.peak_learning_rate() == written["learning_rate"] and recipe.rows_per_step() == written["batch_size"]
    assert FinetuneRecipe.load(path, epochs=7, seed=3).epochs == 7


def test_there_are_examples_of_finance_and_medicine() -> None:
    assert {"german_credit", "icd10_chapter", "moonlight_qlora"} <= {path.stem for path in FILES}


def test_rates_and_batches_follow_from_method_and_preset() -> None:
    def figures(**fields: Any) -> tuple[float, int]:
        recipe = FinetuneRecipe(**NEEDED, **fields)
        return recipe.peak_learning_rate(), recipe.rows_per_step()

    assert figures() == figures(method="head") == (2e-4, 16) and figures(method="full") == (2e-5, 16)
    for name, preset in PRESETS.items():
        assert figures(preset=name) == (preset["learning_rate"], preset["batch_size"])
        assert figures(preset=name, learning_rate=0.5, batch_size=3) == (0.5, 3)


def test_unfreezing_takes_the_fields_of_its_schedule() -> None:
    fields = {"first_layers": 2, "advance": "plateau", "layer_decay": 0.5, "stages": 3}
    assert FinetuneRecipe(**NEEDED, unfreezing=fields).schedule() == Unfreezing(**fields)
    assert FinetuneRecipe(**NEEDED, unfreezing={}).schedule() == Unfreezing()
    assert FinetuneRecipe(**NEEDED, unfreezing={"layer_decay": "9e-1"}).schedule() == Unfreezing(layer_decay=0.9)
    assert FinetuneRecipe(**NEEDED).schedule() is None


def test_numbers_in_scientific_notation(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: a\ntask: b\noutput_dir: c\nlearning_rate: 1e-3\nepochs: 2\n")
    recipe = FinetuneRecipe.load(path)
    assert (recipe.learning_rate, recipe.epochs) == (0.001, 2)


def test_overrides_of_a_mapping_are_merged_into_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: a\ntask: b\noutput_dir: c\ntask_options: {fold: 1, seed: 2}\nunfreezing: {stages: 3}\n")
    recipe = FinetuneRecipe.load(path, task_options={"fold": 4}, unfreezing={"first_layers": 2})
    assert recipe.task_options == {"fold": 4, "seed": 2} and recipe.schedule() == Unfreezing(stages=3, first_layers=2)
    recipe = FinetuneRecipe.load(path, task_options={}, unfreezing=None)
    assert recipe.task_options == {} and recipe.unfreezing is None


# field -> values that are refused; the message names the field
BAD: dict[str, list[Any]] = {
    **dict.fromkeys(("base", "task", "output_dir"), [None, 3, ["a"]]),
    **dict.fromkeys(("data", "general_text", "preset"), [3, ["a"]]),
    **dict.fromkeys(("limit", "batch_size", "micro_batch_size", "max_steps"), [0, -1, 1.5, "2", True]),
    **dict.fromkeys(("patience", "validation_rows"), [0, -1, 1.5, "2", True]),
    **dict.fromkeys(("rank", "evaluations_per_epoch"), [0, 2.5, "2", None, True]),
    **dict.fromkeys(("warmup_ratio", "min_lr_ratio"), [-0.1, 1.1, None, "a", float("nan")]),
    **dict.fromkeys(("adaptive_lr", "compare", "gradient_checkpointing", "merge"), [1, "yes", None]),
    "task_options": [None, ["fold"], {1: 2}, *({name: "x"} for name in NO_OPTIONS)],
    "method": ["qlora", None, 1],
    "targets": [None, "all", [], [1], ["attention", "embedding"]],
    "alpha": [0, 2.5, "16"],
    "dropout": [-0.1, 1.0, "a", None],
    "layers": [3, "1", [1.5], ["1"], [True]],
    "quantize": ["int8", None],
    "unfreezing": [True, "epochs", {"stage": 1}, {1: 2}, {"every": 0}, {"advance": "days"}, {"layer_decay": 0}],
    "learning_rate": [0, 0.0, -1e-4, 11.0, "fast", float("nan")],
    "weight_decay": [-0.1, 11, None],
    "epochs": [0, -1, "many", None],
    "max_length": [1, 2.5, None],
    "grad_clip": [0, None],
    "mtp": ["yes", True],
    "generate": [-1, 1.5],
    "dtype": ["fp16", None],
    "report_to": ["wandb", [1], None],
    "seed": [-1, 1.5, 2**32],
}


def test_every_field_is_among_them() -> None:
    assert BAD.keys() == FinetuneRecipe.__dataclass_fields__.keys()


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_is_named(field: str) -> None:
    for value in BAD[field]:
        with pytest.raises(ValueError, match=f"recipe: (an element of )?{field}\\b"):
            FinetuneRecipe(**{**NEEDED, field: value})
    with pytest.raises(ValueError, match="preset is 'fast', allowed are domain-adaptation"):
        FinetuneRecipe(**NEEDED, preset="fast")


def test_what_does_not_go_together() -> None:
    for method in ("full", "head"):
        with pytest.raises(ValueError, match=f"quantize is 'nf4' with method '{method}'"):
            FinetuneRecipe(**NEEDED, quantize="nf4", method=method)
    with pytest.raises(ValueError, match="unfreezing with method 'head'"):
        FinetuneRecipe(**NEEDED, unfreezing={}, method="head")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("base: a\ntask: b", ["output_dir"]),
        ("base: a\ntask: b\noutput_dir: c\nlearning_rat: 1", ["unknown field learning_rat", "learning_rate"]),
        ("base: a\ntask: b\noutput_dir: c\nrank: 0", ["rank is 0"]),
        ("- base", ["list"]),
        ("base: [", ["cannot be read"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        FinetuneRecipe.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
