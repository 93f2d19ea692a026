"""The model card against the record of a real run: every figure, every missing field, the front matter, the code."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from deepseek_v3.configuration import preset
from deepseek_v3.durable import file_sha256
from deepseek_v3.hub import write_pretraining_card
from deepseek_v3.training import pretrain
from tests.training.helpers import pretrain_module, tiny_recipe, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("card")
    recipe = tiny_recipe(folder / "run", write_corpus(folder / "corpus"), compare=True, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_module, "write_samples", lambda *_: "")
        return folder / "run" / "model", pretrain(recipe)


@pytest.fixture
def record(run: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(run[1])


def table(card: str, heading: str) -> dict[str, str]:
    """The rows of the table under `## heading`."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert all(len(row) == 2 for row in rows)
    return dict(rows)


def test_every_figure_is_the_record_s(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    path = write_pretraining_card(run[0], record)
    assert path == run[0] / "README.md"
    card = path.read_text()
    assert "$" not in card and "None" not in card and "n/a" not in card and str(run[0].parents[1]) not in card

    config, parameters = preset("tiny"), record["parameters"]
    architecture = table(card, "Architecture")
    assert architecture["layers"] == f"{config.num_hidden_layers}, the first {config.first_k_dense_replace} dense"
    assert architecture["hidden size"] == str(config.hidden_size)
    for text in (f"{config.num_attention_heads} heads", f"latent {config.kv_lora_rank}"):
        assert text in architecture["attention"]
    for text in (f"{config.n_routed_experts} routed (top {config.num_experts_per_tok})", "1 shared", "each 32 wide"):
        assert text in architecture["experts"]
    assert architecture["vocabulary"] == "512"
    assert architecture["MTP layers"] == f"1 ({parameters['mtp']:,} parameters)"
    assert architecture["parameters"] == f"{parameters['total']:,} total, {parameters['activated']:,} per token"
    assert f"{parameters['total'] / 1e6:.1f}M parameters" in card.replace("\n", " ")

    training, recipe, environment = table(card, "Training"), record["recipe"], record["environment"]
    assert training["tokens"] == f"{record['tokens']:,} in 3 steps of 4 x 32"
    assert training["compute"] == f"{record['train_flops']:.3g} FLOPs, {record['train_seconds']} s"
    hardware = f"{environment['hardware']}; device cpu, {environment['threads']} threads"
    assert training["hardware"] == hardware
    for key in ("beta1", "beta2", "weight_decay", "learning_rate"):
        assert str(recipe[key]) in training["optimizer"]
    assert (training["precision"], training["seed"]) == (record["dtype"], str(recipe["seed"]))
    for key in ("python", "torch", "transformers", "package", "git"):
        assert environment[key] in training["software"]
    block = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert block == {**{k: v for k, v in recipe.items() if k != "output_dir"}, "data": "corpus"}
    assert training["date"] == record["date"]

    evaluation = table(card, "Evaluation")
    bits = record["heldout_bits_per_byte"]
    assert evaluation.pop("**this model**") == f"**{bits:.3f}**"
    found = [evaluation[row] for row in evaluation if row not in ("model", "---")]
    assert found == [f"{record['baselines_bits_per_byte'][key]:.3f}" for key in ("gzip", "5-gram", "dense")]
    flat = re.sub(r"\s+", " ", card)
    names = {"gzip": "gzip -9", "5-gram": "5-gram (Kneser-Ney, same tokens)", "dense": "dense model of equal compute"}
    better = [names[key] for key, value in record["baselines_bits_per_byte"].items() if value < bits]
    assert f"Baselines with better bits per byte than this model: {', '.join(better) or 'none'}." in flat
    mtp, load, corpus = record["mtp"], record["load"], record["corpus"]
    assert f"{mtp['acceptance']:.1%} of {mtp['drafts']:,} drafts accepted, {mtp['tokens_per_forward']:.2f} tok" in flat
    assert f"peaked at {load['max_violation_peak']:.2f} and was {load['max_violation_last']:.2f}" in flat
    assert f"in the last steps: {load['dead_experts_last']:.1%}." in flat
    for key in ("train_documents", "train_bytes", "heldout_documents", "heldout_bytes"):
        assert f"{corpus[key]:,} " in flat
    assert corpus["sha256"] in flat and f"What is held out is {corpus['split']}." in flat
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", round(bits, 6))
    assert result.metric_name == f"bits per byte, n = {corpus['heldout_documents']} documents"
    assert (result.dataset_name, result.dataset_revision) == ("corpus", corpus["sha256"])


def test_what_lies_beside_the_card(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    write_pretraining_card(run[0], record)
    assert (run[0] / "load.png").read_bytes() == (run[0].parent / "load.png").read_bytes()
    assert "](load.png)" in (run[0] / "README.md").read_text()
    beside = json.loads((run[0] / "run.json").read_text())
    assert "output_dir" not in beside["recipe"] and beside["corpus"]["name"] == beside["recipe"]["data"] == "corpus"
    del record["recipe"]["output_dir"]
    assert {**beside, "recipe": 0, "corpus": 0} == {**json.loads(json.dumps(record)), "recipe": 0, "corpus": 0}
    plots = [run[0] / "load.png", run[0].parent / "load.png"]
    contents = [plot.read_bytes() for plot in plots]
    for plot in plots:
        plot.unlink()
    with pytest.raises(ValueError, match="load.png: not found; the card of"):
        write_pretraining_card(run[0], record)
    for plot, content in zip(plots, contents, strict=True):
        plot.write_bytes(content)


def test_figures_measured_again_have_intervals(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    figure = {"value": 1.25, "low": 1.125, "high": 1.5, "n": 40}
    text = {"name": "stdlib, held-out split", "sha256": "a" * 64, "length": 128, "bits_per_byte": figure}
    weights = {path.name: file_sha256(path) for path in run[0].glob("*.safetensors")}
    (run[0] / "evaluation.json").write_text(json.dumps({"text": {"stdlib": text}, "files": weights}))
    card = write_pretraining_card(run[0], record).read_text()
    others = dict.fromkeys(weights, "0" * 64)
    (run[0] / "evaluation.json").write_text(json.dumps({"text": {"stdlib": text}, "files": others}))
    assert "1.250 bits per byte" not in write_pretraining_card(run[0], record).read_text()
    (run[0] / "evaluation.json").unlink()
    assert "1.250 bits per byte, 95 % interval 1.125 to 1.500 over 40 rows of 128 tokens" in card
    result = ModelCard(card).data.eval_results[1]
    assert result.metric_name == "bits per byte, 95 % interval 1.125 to 1.5, n = 40" and result.metric_value == 1.25


def test_the_peak_is_the_one_that_was_reached(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    record["recipe"] |= {"warmup_steps": 4 * record["steps"], "learning_rate": 0.01}
    card = write_pretraining_card(run[0], record).read_text()
    assert table(card, "Training")["optimizer"].endswith("peak learning rate 0.0025, cosine")


def test_mtp_layers_that_drafted_nothing(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    config = run[0] / "config.json"
    before = config.read_text()
    for changed, text in (
        ({}, "MTP: no draft was made on the held-out prompts."),
        ({"mtp_loss_coef": 0.0}, "MTP: not trained, so not used."),
        ({"num_nextn_predict_layers": 0}, "The model has no MTP layer."),
    ):
        config.write_text(json.dumps(json.loads(before) | changed))
        card = write_pretraining_card(run[0], record | {"mtp": None}).read_text()
        assert text in card and "use_mtp=False" in card
    config.write_text(before)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def test_a_changed_figure_changes_the_card(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    """No figure is written down twice or computed from another one."""
    before = write_pretraining_card(run[0], record).read_text()
    shown = 0
    for path in leaves(record):
        changed = copy.deepcopy(record)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if type(inner[path[-1]]) in (int, float) and path[0] != "recipe":
            inner[path[-1]] = 12_345_678
            assert write_pretraining_card(run[0], changed).read_text() != before, path
            shown += 1
    assert shown >= 20


NEEDED = [
    *[
        (key,)
        for key in ("recipe", "steps", "tokens", "train_seconds", "train_flops", "parameters", "dtype", "corpus")
    ],
    *[(key,) for key in ("heldout_bits_per_byte", "baselines_bits_per_byte", "mtp", "load", "environment", "date")],
    *[("recipe", key) for key in ("batch_size", "sequence_length", "beta1", "beta2", "weight_decay", "seed")],
    *[("parameters", key) for key in ("total", "activated", "mtp")],
    *[("corpus", key) for key in ("name", "licence", "sha256", "split")],
    *[("corpus", key) for key in ("train_documents", "train_bytes", "heldout_bytes")],
    *[("mtp", key) for key in ("acceptance", "drafts", "tokens_per_forward")],
    *[("load", key) for key in ("max_violation_peak", "max_violation_last", "dead_experts_last")],
    *[("environment", key) for key in ("package", "git", "python", "torch", "transformers", "device", "hardware")],
    ("environment", "threads"),
]


@pytest.mark.parametrize("path", NEEDED, ids=".".join)
def test_a_missing_field_is_named(run: tuple[Path, dict[str, Any]], record: dict[str, Any], path: tuple[str]) -> None:
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    card = run[0] / "README.md"
    card.write_text("the card before")
    with pytest.raises(ValueError, match=f"record has no field '{path[-1]}'"):
        write_pretraining_card(run[0], record)
    assert card.read_text() == "the card before"
    card.unlink()


def test_a_config_that_cannot_be_used_is_named(tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    config = json.loads((run[0] / "config.json").read_text())
    for content in (None, "{", "[]", json.dumps({**config, "kv_lora_rank": -1})):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError) as caught:
            write_pretraining_card(tmp_path, run[1])
        assert str(tmp_path) in str(caught.value) or "kv_lora_rank" in str(caught.value)


def test_front_matter_is_read_by_the_hub_library(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    card = ModelCard.load(write_pretraining_card(run[0], record, weights_licence="mit"))
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    assert "deepseek_v3" in card.data.tags
    assert card.text.lstrip().startswith("# DeepSeek-V3 architecture")
    assert "Weights: mit." in card.text


def test_without_licence_baselines_or_moe(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    record["corpus"]["licence"] = "PSF-2.0"
    record["load"] = dict.fromkeys(record["load"])
    record["baselines_bits_per_byte"] = {}
    card = write_pretraining_card(run[0], record).read_text()
    assert "Licence: PSF-2.0." in card and "use_mtp=True" in card
    assert "None" not in card


def test_the_code_in_the_card_runs(
    run: tuple[Path, dict[str, Any]],
    record: dict[str, Any],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for mtp in (record["mtp"], None):
        card = write_pretraining_card(run[0], {**record, "mtp": mtp}).read_text()
        (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert str(run[0]) not in code and f"use_mtp={bool(mtp)}" in code
        monkeypatch.chdir(run[0])
        exec(code, {})
        assert "def main(" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../clients/acme_bank/q3_report.txt", "heldout:/data/acme_bank/q3_report.txt"])
def test_no_path_of_a_text_that_was_measured_enters_the_card(
    run: tuple[Path, dict[str, Any]], record: dict[str, Any], name: str
) -> None:
    figure = {"value": 1.25, "low": 1.125, "high": 1.5, "n": 40}
    text = {"name": name, "sha256": "a" * 64, "length": 128, "bits_per_byte": figure}
    (run[0] / "evaluation.json").write_text(json.dumps({"text": {name: text}}))
    card = write_pretraining_card(run[0], record).read_text()
    (run[0] / "evaluation.json").unlink()
    assert "acme_bank" not in card and "q3_report.txt" in ModelCard(card).data.eval_results[1].dataset_name
    assert "q3_report.txt (SHA-256" in card


def test_a_changed_card_is_kept_its_record_is_not(run: tuple[Path, dict[str, Any]], record: dict[str, Any]) -> None:
    path = write_pretraining_card(run[0], record)
    path.write_text(changed := path.read_text().replace("license: apache-2.0", "license: mit"))
    record["steps"] = 4
    assert write_pretraining_card(run[0], record) == path and path.read_text() == changed
    assert json.loads((run[0] / "run.json").read_text())["steps"] == 4
    path.unlink()
