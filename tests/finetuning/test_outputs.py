"""What a run leaves, from a quantized base and after the fact; and that a changed task or base is noticed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deepseek_v3.export import export
from deepseek_v3.finetuning import FinetuneRecipe, finetune, load_task
from deepseek_v3.finetuning.build import load_tokenizer
from deepseek_v3.finetuning.outputs import base_digest
from deepseek_v3.quantization import dequantize_, quantized_fraction
from tests.finetuning.runs import assert_same_weights, recipe, signal_after

IDS = torch.randint(3, 300, (3, 14), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


# --- a base that is quantized on disk


@pytest.mark.parametrize("format, kind, classes", [("int8", "messages", 0), ("nf4", "two", 2), ("bnb-int8", "two", 2)])
def test_a_quantized_base_is_merged(
    base: Path, data: Path, tmp_path: Path, format: str, kind: str, classes: int
) -> None:
    """Into the weights that the adapter was trained on, with a plain configuration."""
    folder = tmp_path / "base"
    export(base, folder, format, progress=False)
    general = {"general_text": str(data / "text" / "train.jsonl")}
    options = {"merge": True, "max_steps": 1, "dtype": "fp32"}
    record = finetune(recipe(folder, data / kind, tmp_path / "run", **options, **general))
    assert record["trainable"]["quantized_byte_fraction"] > 0.05 and set(record["artifacts"]) == {"adapter", "merged"}
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    head: dict[str, Any] = {"num_labels": classes} if classes else {}
    quantized = auto.from_pretrained(folder, dtype=torch.float32, **head)
    assert quantized_fraction(quantized) > 0.2
    quantized.config.pad_token_id = load_tokenizer(str(folder)).pad_token_id
    adapted = PeftModel.from_pretrained(dequantize_(quantized, torch.float32), tmp_path / "run" / "adapter")
    expected = logits(adapted)
    merged = auto.from_pretrained(tmp_path / "run" / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "run" / "merged" / "config.json").read_text())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.01


# --- merging after the fact


@pytest.mark.parametrize("kind, quantize", [("messages", "nf4"), ("two", "none")])
def test_merge_can_be_set_after_the_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, quantize: str
) -> None:
    chosen = recipe(base, data / kind, tmp_path, max_steps=1, quantize=quantize, merge=True)
    expected = finetune(chosen)
    (tmp_path / "merged").rename(tmp_path / "at-once")
    without = {**expected, "artifacts": {"adapter": expected["artifacts"]["adapter"]}}
    (tmp_path / "run.json").write_text(json.dumps(without))  # as of a run without `merge`
    assert finetune(replace(chosen, merge=False)) == without and not (tmp_path / "merged").exists()
    record = finetune(chosen)
    assert "writing merged/ from adapter/" in capsys.readouterr().out
    assert record == expected == json.loads((tmp_path / "run.json").read_text())
    assert_same_weights(tmp_path / "merged", tmp_path / "at-once")
    files = [[path.read_text() for path in sorted((tmp_path / name).glob("*.json"))] for name in ("merged", "at-once")]
    assert files[0] == files[1]
    shutil.rmtree(tmp_path / "merged")  # to save room: it was written once
    assert finetune(chosen) == record and not (tmp_path / "merged").exists()


def test_merging_after_the_run_needs_the_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    finetune(recipe(base, data / "two", tmp_path, max_steps=1))
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"{tmp_path / 'adapter'}: not found, merge needs it; --restart trains it"):
        finetune(recipe(base, data / "two", tmp_path, max_steps=1, merge=True))


# --- a changed task or base

LONG = {"max_steps": 4, "evaluations_per_epoch": 2}


Begun = Callable[[str], tuple[Path, FinetuneRecipe]]


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of base, data, a run that was stopped after step 3 and one that is finished; and a copy of it."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(base, root / "base")
    shutil.copytree(data / "two", root / "data")
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 3)
        with pytest.raises(InterruptedError):
            finetune(recipe(root / "base", root / "data", root / "stopped", **LONG))
    finetune(recipe(root / "base", root / "data", root / "finished", **LONG))
    return root, shutil.copytree(root, tmp_path_factory.mktemp("copies") / "runs")


@pytest.fixture
def begun(runs: tuple[Path, Path]) -> Begun:
    """The folder as it was at first, and the recipe of one of its runs."""
    root, copy = runs

    def get(name: str) -> tuple[Path, FinetuneRecipe]:
        shutil.rmtree(root)
        shutil.copytree(copy, root)
        return root, recipe(root / "base", root / "data", root / name, **LONG)

    return get


def add_a_row(root: Path) -> None:
    with (root / "data" / "train.jsonl").open("a") as file:
        file.write('{"text": "late rent", "label": "event"}\n')


def nudge_a_weight(root: Path) -> None:
    """Another model of the same shapes: names, sizes and headers stay."""
    file = root / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def another_template(root: Path) -> None:
    file = root / "base" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


CHANGES = [(add_a_row, "task", "data"), (nudge_a_weight, "base", "base"), (another_template, "base", "base")]


@pytest.mark.parametrize("change, field, folder", CHANGES, ids=[change.__name__ for change, *_ in CHANGES])
@pytest.mark.parametrize("name", ["stopped", "finished"])
def test_what_a_run_was_begun_with_must_not_change(
    begun: Begun, name: str, change: Any, field: str, folder: str
) -> None:
    root, chosen = begun(name)
    change(root)
    before = {path: path.stat().st_mtime_ns for path in (root / name).rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match=f"inputs.json: {field} {root / folder} has changed: .*; use another"):
        finetune(chosen)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("name, change", [("stopped", add_a_row), ("finished", nudge_a_weight)])
def test_a_folder_that_does_not_say_is_not_compared(begun: Begun, name: str, change: Any) -> None:
    root, chosen = begun(name)
    (root / name / "inputs.json").unlink()
    change(root)
    assert finetune(chosen)["steps"] == 4


def test_restart_takes_what_is_there(begun: Begun) -> None:
    root, chosen = begun("finished")
    add_a_row(root)
    assert finetune(chosen, restart=True)["task"]["rows"]["train"] == 17
    assert finetune(chosen)["task"]["sha256"] == load_task(chosen.task).sha256


def test_what_the_run_was_begun_with_is_written_once(begun: Begun) -> None:
    root, chosen = begun("stopped")
    files = [root / "stopped" / name for name in ("recipe.json", "inputs.json")]
    before = [(file.stat().st_ino, file.read_text()) for file in files]
    finetune(replace(chosen, micro_batch_size=2))
    assert before == [(file.stat().st_ino, file.read_text()) for file in files]


def test_the_digest_of_a_base(tmp_path: Path) -> None:
    """Of what the model and its tokens depend on; of a large file, blocks from all of it."""
    size = 40 * 2**20
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(size)
    found = [base_digest(tmp_path)]
    for name in ("README.md", "run.json", "other.bin"):
        (tmp_path / name).write_text("x")
    assert base_digest(tmp_path) == found[0] and len(found[0]) == 64
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text(name.upper())
        found.append(base_digest(tmp_path))
    for place in (0, size // 2, size - 2**20):
        with (tmp_path / "model-00001-of-00001.safetensors").open("rb+") as file:
            file.seek(place)
            file.write(b"x" * 2**20)
        found.append(base_digest(tmp_path))
    with (tmp_path / "model-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"x")
    found.append(base_digest(tmp_path))
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    found.append(base_digest(tmp_path))
    assert len(set(found)) == len(found) == 10
    assert base_digest(tmp_path / "nowhere") is None and base_digest("nobody/nothing") is None
