"""The cards of a fine-tune: every figure is the record's, a missing one is an error, the hub's library reads them."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from deepseek_v3.finetuning import finetune
from deepseek_v3.hub import figure_text, write_finetuning_cards
from deepseek_v3.hub.finetuning_card import FIGURES
from deepseek_v3.quantization import quantized_fraction
from tests.finetuning.runs import recipe, save_base, write_data

Run = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("cards")
    base = save_base(folder / "base")
    general = {"general_text": str(write_data(folder / "text", "text") / "train.jsonl")}
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "lora": ("two", {"compare": True, "merge": True, **general}),
        "chat": ("messages", {"generate": 2, "merge": True, **general}),
        "full": ("three", {"method": "full", "unfreezing": {}, "preset": "few-shot", "learning_rate": None}),
        "qlora": ("two", {"quantize": "nf4", "merge": True}),
    }
    found = {}
    for name, (kind, changes) in variants.items():
        chosen = recipe(base, write_data(folder / kind, kind), folder / name, **{"epochs": 1, **changes})
        found[name] = Path(chosen.output_dir), finetune(chosen)
    return found


@pytest.fixture
def run(runs: dict[str, Run]) -> Run:
    return copy.deepcopy(runs["lora"])


def cards(run: Run) -> dict[str, str]:
    """Folder -> card."""
    return {path.parent.name: path.read_text() for path in write_finetuning_cards(*run)}


def tables(card: str, heading: str) -> list[list[str]]:
    """The rows of the table under `## heading`."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in rows if not set(row) <= {"", "---"}]


@pytest.mark.parametrize("name", ["lora", "chat", "full"])
def test_every_figure_is_the_record_s(runs: dict[str, Run], name: str) -> None:
    output, record = runs[name]
    found = cards(runs[name])
    assert set(found) == ({"model"} if name == "full" else {"adapter", "merged"})
    for folder, card in found.items():
        assert "$" not in card and "None" not in card and "nan" not in card and str(output.parent) not in card
        block = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
        assert (block["base"], block["seed"]) == ("base", 0) and "output_dir" not in block
        fields = dict(tables(card, "Training"))
        trainable = record["trainable"]
        share = f"{trainable['trainable']:,} of {trainable['parameters']:,} parameters ({trainable['share']:.2%})"
        assert fields["trained"] == share
        tokens = f"{record['train_tokens']:,} tokens"
        assert fields["steps"] == f"{record['steps']} ({record['epochs']:.2f} epochs of 16 rows, {tokens})"
        rate = "1e-06" if name == "full" else "0.01"
        assert fields["learning rate"] == f"{rate}, 8 rows per step" and fields["seed"] == "0"
        assert fields["time"] == f"{record['train_seconds']:,.0f} s"
        assert fields["hardware"].startswith(f"{record['environment']['hardware']}; device cpu")
        assert record["environment"]["git"] in fields["software"]
        assert fields["size"] == f"{record['artifacts'][folder]['bytes'] / 1e6:,.1f} MB"
        assert record["environment"]["torch"] in fields["software"]
        assert record["task"]["sha256"] in card and "16 rows for training, 6 for validation, 8 for the test" in card
        header, *rows = tables(card, "Results")
        shown = [key for key in FIGURES if key in record["test"]]
        assert header == ["", *(FIGURES[key] for key in shown)] and len(shown) >= (2 if name == "chat" else 5)
        every = {"this model": record["test"], **record["baselines"]}
        assert {who: values for who, *values in rows} == {
            who: [figure_text(results[key]) for key in shown] for who, results in every.items()
        }
        flat = re.sub(r"\s+", " ", card)
        main = "rouge_l" if name == "chat" else "accuracy"
        own = record["test"][main]["value"]
        better = [who for who, found in record["baselines"].items() if found[main]["value"] > own]
        if record["baselines"]:
            assert f"better {FIGURES[main]} than this model: {', '.join(better) or 'none'}." in flat
        else:
            assert "No baseline was measured." in flat
        if labels := record["task"]["labels"]:
            assert f"- classes, in the order of the logits: {'; '.join(labels)}" in flat
        if name == "full":
            assert "Forgetting was not measured." in flat and "with progressive unfreezing" in fields["method"]
        else:
            bits = record["general_bits_per_byte"]
            assert f"{bits['before']:.3f} bits per byte before, {bits['after']:.3f} after" in flat
            assert fields["targets"] == "attention, experts" and fields["rank"] == "4"
        layers = record["experts"]["layers"]
        layer, most = max(layers.items(), key=lambda item: item[1]["max"])
        assert f"expert {most['most'][0][0]} of `{layer}`, by {most['max']:.3%}" in flat
        mean = sum(values["mean"] for values in layers.values()) / len(layers)
        assert f"by {mean:.3%} of their norm" in flat
        assert f"holds {record['experts']['share_of_top_tenth']:.0%} of the squared" in flat
        if name == "lora":
            at = record["test"]["at_validation_recall"]
            assert f"threshold {at['threshold']:.4g}, which finds 90% of the validation rows of class `none`:" in flat
            for key in ("sensitivity", "specificity", "review_rate"):
                assert f" {figure_text(at[key])}" in flat
        else:
            assert "At the threshold" not in flat
        rouge = "On 8 test rows, one run with seed 0; ROUGE-L on answers of up to 48 tokens to 2 of them. In brackets"
        assert (rouge in flat) == (name == "chat")


def test_a_small_threshold_is_not_zero(run: Run) -> None:
    """As of a class that is rare."""
    run[1]["test"]["at_validation_recall"]["threshold"] = 0.00041237
    assert "At the threshold 0.0004124, which" in cards(run)["merged"]


def test_the_review_rate_says_where_its_threshold_is_from(run: Run) -> None:
    """And is no figure to be compared elsewhere."""
    card = cards(run)["merged"]
    header, *_ = tables(card, "Results")
    assert "review rate at 90 % recall (threshold from these rows: a lower bound)" in header
    assert "review_rate" in run[1]["test"] and "review" not in card.split("---\n")[1]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def inner(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def test_a_changed_figure_changes_the_card(run: Run) -> None:
    """No figure is written down twice or computed from another one."""
    before, shown = cards(run), set()
    for path in leaves(run[1]):
        changed = copy.deepcopy(run[1])
        if path[0] in ("recipe", "history") or type(inner(changed, path)) not in (int, float):
            continue
        inner(changed, path[:-1])[path[-1]] = 12_345_678.0
        if cards((run[0], changed)) != before:
            shown.add(path)
    groups = {path[:2] for path in shown}
    figures = {("test", key) for key in FIGURES if key in run[1]["test"]}
    who = {("baselines", name) for name in ("majority", "tfidf", "tfidf_balanced")}
    bits = {("general_bits_per_byte", "before"), ("general_bits_per_byte", "after")}
    rest = {("test", "n"), ("trainable", "trainable"), ("trainable", "parameters"), ("trainable", "share")}
    single = {("steps",), ("epochs",), ("learning_rate",), ("batch_size",), ("train_seconds",), ("peak_memory_bytes",)}
    assert figures | who | bits | rest | single | {("train_tokens",), ("experts", "share_of_top_tenth")} <= groups
    assert all(("test", key, end) in shown for _, key in figures for end in ("value", "low", "high"))


NEEDED = [
    *[(key,) for key in ("artifacts", "recipe", "task", "trainable", "test", "baselines", "experts", "environment")],
    *[(key,) for key in ("steps", "epochs", "learning_rate", "batch_size", "train_seconds", "peak_memory_bytes")],
    *[("recipe", key) for key in ("base", "method", "quantize", "unfreezing", "targets", "rank", "seed")],
    *[("task", key) for key in ("name", "kind", "labels", "source", "sha256", "licence", "notes", "rows")],
    *[("task", "rows", key) for key in ("train", "validation", "test")],
    *[("trainable", key) for key in ("trainable", "parameters", "share")],
    *[("environment", key) for key in ("device", "torch", "transformers", "peft")],
    *[("general_bits_per_byte",), ("general_bits_per_byte", "after"), ("experts", "share_of_top_tenth")],
    *[("test", "n"), ("test", "at_validation_recall", "threshold"), ("artifacts", "merged", "bytes")],
    *[("environment", key) for key in ("package", "git", "python", "hardware", "threads")],
    *[("train_tokens",), ("date",)],
]


@pytest.mark.parametrize("path", NEEDED, ids=".".join)
def test_a_missing_field_is_named(run: Run, path: tuple[str, ...]) -> None:
    output, record = run
    del inner(record, path[:-1])[path[-1]]
    for folder in ("adapter", "merged"):
        (output / folder / "README.md").write_text("the card before")
    with pytest.raises(ValueError, match=f"record has no field '{path[-1]}'"):
        write_finetuning_cards(output, record)
    paths = [output / folder / "README.md" for folder in ("adapter", "merged")]
    assert [path.read_text() for path in paths] == ["the card before"] * 2
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("name", ["lora", "chat", "full"])
def test_front_matter(runs: dict[str, Run], name: str) -> None:
    output, record = runs[name]
    for folder, card in cards(runs[name]).items():
        data = yaml.safe_load(card.split("---\n")[1])
        assert data == ModelCard.load(output / folder / "README.md").data.to_dict()
        adapter = folder == "adapter"
        assert not {"base_model", "base_model_relation", "license"} & set(data)  # the base lies in a folder
        assert data["library_name"] == ("peft" if adapter else "transformers")
        assert data["pipeline_tag"] == ("text-generation" if name == "chat" else "text-classification")
        assert {"deepseek_v3", "lora" if name != "full" else "fine-tuned"} <= set(data["tags"])


def test_a_published_base_and_its_licence(run: Run) -> None:
    card = Path(run[1]["recipe"]["base"]) / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    (adapter, merged) = (ModelCard.load(path) for path in write_finetuning_cards(*run, base_model="some/base"))
    card.write_text("# no front matter")
    assert ModelCard.load(write_finetuning_cards(*run)[0]).data.license is None
    card.unlink()
    assert (adapter.data.base_model, adapter.data.license) == ("some/base", "mit")
    assert adapter.data.base_model_relation == "adapter" and merged.data.base_model_relation == "finetune"
    assert "made from `some/base`" in adapter.text.replace("\n", " ") and "Weights: mit." in merged.text
    run[1]["recipe"]["base"] = "some/where"
    with pytest.raises(ValueError, match="some/where: config.json cannot be read"):
        write_finetuning_cards(*run)


@pytest.mark.parametrize("name", ["lora", "chat", "full"])
def test_the_figures_are_in_the_model_index(runs: dict[str, Run], name: str) -> None:
    record = runs[name][1]
    for folder in cards(runs[name]):
        found = ModelCard.load(runs[name][0] / folder / "README.md").data.eval_results
        shown = {key: record["test"][key] for key in FIGURES if record["test"].get(key)}
        shown.pop("review_rate_at_recall", None)
        assert {r.metric_type: r.metric_value for r in found} == {k: round(v["value"], 6) for k, v in shown.items()}
        for result in found:
            figure = shown[result.metric_type]
            known = figure["low"] is not None
            interval = f", 95 % interval {figure['low']:.4g} to {figure['high']:.4g}" if known else ""
            n = 2 if result.metric_type == "rouge_l" else 8
            assert result.metric_name == f"{FIGURES[result.metric_type]}{interval}, n = {n} rows"
            assert result.dataset_revision == record["task"]["sha256"] and result.dataset_split == "test"


@pytest.mark.parametrize("name", ["lora", "chat", "full", "qlora"])
def test_the_code_in_the_card_runs(runs: dict[str, Run], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = {}
    for folder, card in cards(runs[name]).items():
        monkeypatch.chdir(runs[name][0] / folder)
        (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        scope: dict[str, Any] = {}
        exec(code, scope)
        assert type(scope["model"]).__name__.startswith("PeftModel") == (folder == "adapter")
        assert (quantized_fraction(scope["model"]) > 0) == (name == "qlora" and folder == "adapter")
        inputs = scope["tokenizer"](["late debt", "paid"], return_tensors="pt", padding=True)
        found = logits[folder] = scope["model"](**inputs).logits
        assert found.shape[0] == 2 and found.shape[-1] == {"chat": 400, "full": 3}.get(name, 2)
    if "merged" in logits:
        torch.testing.assert_close(logits["adapter"], logits["merged"], rtol=1e-3, atol=1e-4)


def test_a_figure_without_an_interval_or_value(run: Run) -> None:
    assert figure_text({"value": 0.25, "low": 0.1234, "high": 1.0}) == "0.250 [0.123, 1.000]"
    assert figure_text({"value": 0.25, "low": None, "high": None}) == "0.250"
    assert figure_text({"value": None, "low": None, "high": None}) == figure_text(None) == "undefined"
    run[1]["test"]["roc_auc"] = dict.fromkeys(("value", "low", "high"))  # one class in the test split
    run[1]["test"]["ece"] |= {"low": None, "high": None}
    (header, first, *_) = tables(cards(run)["merged"], "Results")
    values = dict(zip(header, first, strict=True))
    assert values["ROC AUC"] == "undefined"
    assert values["calibration error (ECE)"] == f"{run[1]['test']['ece']['value']:.3f}"


def test_what_a_card_says_of_its_domain_groups_and_licence(run: Run) -> None:
    domains = {"german-credit": "EU AI Act", "icd10-chapter": "no medical device", "medquad": "not medical advice"}
    for name, words in {**domains, "financeiq": "do not trade", "own": "your own data"}.items():
        run[1]["task"]["name"] = name
        assert words in cards(run)["adapter"]
    run[1]["task"]["licence"], run[1]["test"]["n_groups"], run[1]["experts"] = "CC-BY-4.0", 4, {}
    card = cards(run)["adapter"].replace("\n", " ")
    assert "n = 8 rows in 4 groups" in card
    assert "Licence: CC-BY-4.0." in card and "over the test groups" in card and "experts did not move" in card


def test_a_changed_card_is_kept(run: Run) -> None:
    output, record = run
    adapter, merged = write_finetuning_cards(output, record)
    adapter.write_text(changed := adapter.read_text().replace("library_name", "license: mit\nlibrary_name"))
    record["task"]["name"] = "another"
    assert write_finetuning_cards(output, record) == [adapter, merged]
    assert adapter.read_text() == changed and "# another: model" in merged.read_text()
    adapter.unlink()
