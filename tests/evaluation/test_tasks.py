"""Tasks of a fine-tuned model are scored on the rows that its run held out, and on no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.evaluation import evaluate
from deepseek_v3.evaluation.tasks import UNKNOWN, choose_task, split_name
from deepseek_v3.export import export
from deepseek_v3.finetuning import finetune, load_task
from deepseek_v3.hub import write_finetuning_cards
from tests.finetuning.runs import recipe, save_base, write_data

# of 120 rows; every one of these changes the rows or what is read of them
OPTIONS = {"seed": 5, "positive": "event"}
LIMIT, MAX_LENGTH = 15, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run on a file of rows, whose splits are drawn; in the folder `run`."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_data(folder, "two", {"rows": 120}) / "rows.jsonl"
    chosen = recipe(
        save_base(folder / "base"), rows, folder / "run",
        task_options=OPTIONS, limit=LIMIT, max_length=MAX_LENGTH, max_steps=1, merge=True,
    )  # fmt: skip
    record = finetune(chosen)
    write_finetuning_cards(folder / "run", record)
    return record


@pytest.fixture
def rows(run: dict[str, Any]) -> str:
    return run["task"]["source"]


@pytest.fixture
def merged(run: dict[str, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(run["recipe"]["output_dir"]) / "merged", tmp_path / "merged"))


def score(folder: Path, task: str, **options: Any) -> dict[str, Any]:
    record = evaluate(folder, tasks=[task], anchors=False, **options)
    assert record == json.loads((folder / "evaluation.json").read_text())
    (found,) = record["tasks"].values()
    return found


def test_the_run_s_own_rows_give_the_run_s_figures(run: dict[str, Any], merged: Path, rows: str) -> None:
    found = score(merged, rows)
    assert (found["options"], found["max_length"]) == (OPTIONS, MAX_LENGTH)
    assert found["sha256"] == run["task"]["sha256"] and UNKNOWN not in found["notes"]
    assert found["n"] == run["test"]["n"] == LIMIT
    for name in ("accuracy", "roc_auc", "brier"):
        assert found[name]["value"] == pytest.approx(run["test"][name]["value"], rel=1e-5)
    assert found["classes"].keys() == {"none", "event"} and list(found["classes"])[1] == "event"


def test_fewer_rows_and_longer_ones_may_be_asked_for(run: dict[str, Any], merged: Path, rows: str) -> None:
    found = score(merged, rows, limit=6, max_length=40, task_options=OPTIONS)
    assert (found["n"], found["max_length"], found["options"]) == (6, 40, OPTIONS)
    assert found["brier"] != run["test"]["brier"]


@pytest.mark.parametrize("limit", [None, 3])
def test_other_rows_than_the_run_s_are_refused(merged: Path, rows: str, limit: int | None) -> None:
    """Of another split the model has seen some."""
    found = "merged/run.json: task rows.jsonl: found other rows .SHA-256 .*, task_options {'seed': 0, 'positive'.*"
    with pytest.raises(ValueError, match=f"{found}: it may have been trained on some; allowed are the run's"):
        evaluate(merged, tasks=[rows], task_options={"seed": 0}, limit=limit)
    (merged / "rows.jsonl").write_text(Path(rows).read_text().replace("late", "later"))
    with pytest.raises(ValueError, match="task rows.jsonl: found other rows"):
        evaluate(merged, tasks=[str(merged / "rows.jsonl")], limit=limit)
    assert not (merged / "evaluation.json").exists()


def test_where_no_record_tells_the_rows_the_options_are_given(
    run: dict[str, Any], merged: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As for an export."""
    export(merged, tmp_path / "out", "bf16", progress=False, dtype="fp32")
    found = score(tmp_path / "out", rows, task_options=OPTIONS, limit=LIMIT, max_length=MAX_LENGTH)
    assert found["sha256"] == run["task"]["sha256"] and UNKNOWN not in found["notes"]
    assert found["accuracy"] == run["test"]["accuracy"]
    with pytest.raises(ValueError, match=r"its classes are \('event', 'none'\), the checkpoint's id2label has"):
        evaluate(tmp_path / "out", tasks=[rows])
    assert UNKNOWN in capsys.readouterr().out


def fine_tuning(**changes: Any) -> dict[str, Any]:
    """A record of a fine-tuning on `rows.jsonl`, with the wrong hash."""
    recipe = {"task_options": {}, "max_length": 4, "limit": None}
    return {"task": {"name": changes.pop("name", "rows.jsonl"), "sha256": "0"}, "recipe": {**recipe, **changes}}


OTHERS: list[Any] = [None, [], {"recipe": {"seed": 0}}, fine_tuning(name="other.jsonl"), fine_tuning(task_options=[])]


@pytest.mark.parametrize("content", OTHERS)
def test_a_record_of_something_else_tells_nothing(rows: str, tmp_path: Path, content: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps(fine_tuning()))
    with pytest.raises(ValueError, match="found other rows"):
        choose_task(tmp_path, rows)
    (tmp_path / "run.json").write_text(json.dumps(content))
    if content is None:
        (tmp_path / "run.json").unlink()
    chosen = choose_task(tmp_path, rows)
    assert (chosen.options, chosen.max_length, chosen.notes) == ({}, 512, [UNKNOWN])
    assert chosen.data.sha256 == load_task(rows).sha256


def test_a_path_may_hold_an_equals_sign(merged: Path, rows: str, tmp_path: Path) -> None:
    (tmp_path / "dt=2026-11-01").mkdir()
    copied = str(shutil.copy(rows, tmp_path / "dt=2026-11-01"))
    assert split_name(copied) == (copied, None) and split_name("pubmedqa=/a=b") == ("pubmedqa", "/a=b")
    assert score(merged, copied)["source"] == "rows.jsonl"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task_options": {"fold": 3}}, r"unknown options \['fold'\]; allowed"),
        ({"task_options": {"limit": 3}}, "task_options: found limit, allowed are options of the task"),
        ({"task_options": {"seed": 3}, "tasks": []}, "task_options: found seed, allowed with tasks only"),
        ({"max_length": 0}, "max_length: found 0, allowed are whole numbers from 1"),
    ],
)
def test_options_that_no_task_has_are_named(merged: Path, rows: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(merged, **{"tasks": [rows], **options})
