"""`evaluate` on small checkpoints: what its record holds, and what it refuses."""

import json
import mmap
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from deepseek_v3.evaluation import evaluate, speed
from deepseek_v3.evaluation.speed import mtp_acceptance, throughput
from deepseek_v3.evaluation.text import TextRows, text_results
from deepseek_v3.export import export
from deepseek_v3.finetuning import load_task
from deepseek_v3.finetuning.evaluate import evaluate_task
from deepseek_v3.process import peak_memory
from tests.evaluation.helpers import tiny_model, tiny_tokenizer, write_checkpoint, write_text
from tests.modeling_deepseek_v3.helpers import build, tiny_config, tokens

evaluation_run = import_module("deepseek_v3.evaluation.run")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """A copy of it that nothing has measured."""
    ignored = shutil.ignore_patterns("evaluation.json")
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint", ignore=ignored))


def write_rows(path: Path) -> str:
    lines = [{"text": f"item {i} is {'good' if i % 3 else 'bad'}", "label": "yn"[i % 3 == 0]} for i in range(120)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_the_record_of_a_language_model(checkpoint: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "text")
    record = evaluate(checkpoint, text=[source], limit=6, length=32)
    assert record == json.loads((checkpoint / "evaluation.json").read_text())
    assert str(tmp_path) not in json.dumps(record)  # it is published
    results = record["text"][Path(source).name]
    assert results["rows"] == 6 and results["bits_per_byte"]["n"] == 6 and results["length"] == 32
    assert set(results["anchors_bits_per_byte"]) == {"gzip"}
    assert results["mtp_acceptance"]["drafts"] > 0
    assert record["throughput"]["decode_tokens_per_second"] > 0
    assert record["peak_memory_bytes"] > 2**20
    model = DeepseekV3ForCausalLM.from_pretrained(checkpoint)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_the_peak_is_that_of_the_call(folder: Path, tmp_path: Path) -> None:
    """Not that of what its process did before."""
    mmap.mmap(-1, 2**29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    before = peak_memory()
    assert evaluate(folder, text=[write_text(tmp_path / "text")], limit=2)["peak_memory_bytes"] < before


def test_two_texts_of_one_name_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    sources = [write_text(tmp_path / folder / "text", 2) for folder in ("a", "b")]
    with pytest.raises(ValueError, match="found a second one called 'text'"):
        evaluate(checkpoint, text=sources, limit=1)


@pytest.mark.parametrize("names", [["/a/rows.jsonl", "/b/rows.jsonl"], ["pubmedqa=/a", "pubmedqa=/b"]])
def test_two_tasks_of_one_name_are_refused(checkpoint: Path, names: list[str]) -> None:
    """Before anything is measured."""
    called = names[0].partition("=")[0].split("/")[-1]
    with pytest.raises(ValueError, match=f"task '{names[1]}': found a second one called '{called}'; allowed is one"):
        evaluate(checkpoint, tasks=names)


@pytest.mark.parametrize("limit", [-1, 0, 2.5, True])
def test_a_limit_counts_from_one(checkpoint: Path, limit: Any) -> None:
    with pytest.raises(ValueError, match=f"limit: found {limit}, allowed are whole numbers from 1"):
        evaluate(checkpoint, limit=limit)


def write_texts(path: Path) -> str:
    path.write_text("\n".join(json.dumps({"text": f"row {i}: {i * i} and more"}) for i in range(60)))
    return str(path)


def test_no_path_enters_the_record(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme").mkdir()
    write_text(tmp_path / "acme" / "text")
    write_texts(tmp_path / "acme" / "rows.jsonl")
    monkeypatch.chdir(folder)
    relative = os.path.relpath(tmp_path)
    for above in (str(tmp_path), relative):
        sources = {"text": [f"heldout:{above}/acme/text"], "tasks": [f"{above}/acme/rows.jsonl"]}
        record = evaluate(".", **sources, limit=1, anchors=False)
        assert record["text"].keys() == {"text, held-out split"} and record["tasks"].keys() == {"rows.jsonl"}
        assert record["tasks"]["rows.jsonl"]["source"] == "rows.jsonl"
        assert "acme" not in json.dumps(record) and record["checkpoint"] == folder.name


def test_a_second_call_adds_to_the_figures_of_the_same_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = (write_text(tmp_path / name, 2) for name in ("first", "second"))
    before = evaluate(folder, text=[first], limit=1, seed=1)
    capsys.readouterr()
    after = evaluate(folder, text=[second], limit=2)
    assert "evaluation.json: adds to the figures of the same weights" in capsys.readouterr().out
    assert after["text"]["first"] == before["text"]["first"] and after["text"]["second"]["rows"] == 2
    assert [after["text"][name]["seed"] for name in ("first", "second")] == [1, 0]
    assert after == json.loads((folder / "evaluation.json").read_text())
    (tmp_path / "first" / "00.txt").write_text("changed " * 99)
    again = evaluate(folder, text=[first], limit=3, anchors=False)
    assert "text first: replaces the figures of other data of this name" in capsys.readouterr().out
    assert again["text"]["first"]["rows"] == 3 and "anchors_bits_per_byte" not in again["text"]["first"]

    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    capsys.readouterr()
    other = evaluate(folder, text=[second], limit=2, anchors=False)
    assert "evaluation.json: is not of these weights, begins anew" in capsys.readouterr().out
    assert other["text"].keys() == {"second"}


def test_figures_that_are_not_finite_are_named_and_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [write_text(tmp_path / name, 2) for name in ("good", "bad")]

    def measured(model: Any, rows: TextRows) -> dict[str, Any]:
        found = text_results(model, rows)
        return found if rows.text.name == "good" else {**found, "bits_per_byte": {"value": float("nan"), "n": 1}}

    monkeypatch.setattr(evaluation_run, "text_results", measured)
    with pytest.raises(ValueError, match="evaluation.json: left out: text bad: bits_per_byte.value is nan$"):
        evaluate(folder, text=texts, limit=1)
    assert json.loads((folder / "evaluation.json").read_text())["text"].keys() == {"good"}


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    """Before anything is measured."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"numbers that are not finite in model.layers.1.self_attn.o_proj.weight"):
        evaluate(folder)
    assert not (folder / "evaluation.json").exists()


def test_packed_weights_count_as_what_they_stand_for(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "int8", "int8", progress=False)
    record = evaluate(tmp_path / "int8", text=[write_text(tmp_path / "text")], limit=2, anchors=False)
    model = DeepseekV3ForCausalLM.from_pretrained(checkpoint)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_text_task_has_the_figures_of_fine_tuning(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    write_texts(path)
    record = evaluate(checkpoint, text=[write_text(tmp_path / "t", 2)], tasks=[str(path)], limit=5, anchors=False)
    task = load_task(str(path), limit=5)
    model, tokenizer = DeepseekV3ForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    expected = evaluate_task(model, task, tokenizer, 512)
    found = record["tasks"][path.name]
    assert found["n"] == expected["n"] == 5
    assert found["bits_per_byte"]["value"] == pytest.approx(expected["bits_per_byte"]["value"], rel=1e-5)
    assert found["kind"] == "text" and found["sha256"] == task.sha256


def test_a_classifier_and_its_baselines(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    task = load_task(rows)
    config = tiny_config(vocab_size=300, num_labels=2, pad_token_id=2, num_nextn_predict_layers=0)
    config.id2label = dict(enumerate(task.labels))
    model, folder = build(config, DeepseekV3ForSequenceClassification), tmp_path / "classifier"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    record = evaluate(folder, tasks=[rows])
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    results = record["tasks"][Path(rows).name]
    assert record["text"] == {} and "throughput" not in record
    assert results["n"] == len(task.test) and set(results["baselines"]) >= {"majority", "tfidf"}
    with torch.no_grad():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        logits = [model(tokenizer(row["text"], return_tensors="pt").input_ids).logits[0] for row in task.test]
    right = [task.labels[int(z.argmax())] == row["label"] for z, row in zip(logits, task.test, strict=True)]
    assert results["accuracy"]["value"] == pytest.approx(np.mean(right))
    lengths = [len(tokenizer(row["text"]).input_ids) for row in task.test]
    longest = max(lengths)
    assert results["n_truncated"] == 0 and not any("longer than" in note for note in results["notes"])
    results = evaluate(folder, tasks=[rows], max_length=longest - 1, anchors=False)["tasks"][Path(rows).name]
    assert results["n_truncated"] == lengths.count(longest)
    assert f"of {len(lengths)} rows of test are longer than max_length {longest - 1}" in results["notes"][-1]
    with pytest.raises(ValueError, match="a classifier; text and lm-eval tasks need a language model"):
        evaluate(folder, text=["stdlib"])
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(60)))
    with pytest.raises(ValueError, match="needs a language model"):
        evaluate(folder, tasks=[str(texts)])


def test_what_cannot_be_evaluated_is_named(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    source = write_text(tmp_path / "text", 2)
    with pytest.raises(ValueError, match="no classification head"):
        evaluate(checkpoint, text=[source], tasks=[rows], limit=2)
    with pytest.raises(ValueError, match="no checkpoint"):
        evaluate(tmp_path)
    write_checkpoint(tmp_path / "small", vocab_size=280)
    with pytest.raises(ValueError, match="token .* has id 299, but config.vocab_size is 280"):
        evaluate(tmp_path / "small", text=[source], limit=2)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter: merge it first"):
        evaluate(tmp_path)


def test_speed_counts_tokens_and_mtp_counts_drafts() -> None:
    model = tiny_model()
    prompts = [tokens(12, vocab=300, seed=i) for i in range(3)]
    figures = throughput(model, prompts[0])
    assert figures["prompt_tokens"] == 12 and figures["clock"] == "process CPU time"
    found = mtp_acceptance(model, prompts, max_new_tokens=10)
    stats = [
        model.generate(
            prompt[None], attention_mask=torch.ones(1, 12, dtype=torch.int64), pad_token_id=0, max_new_tokens=10,
            do_sample=False, use_mtp=True, num_mtp_draft=1, return_dict_in_generate=True,
        ).mtp_stats
        for prompt in prompts
    ]  # fmt: skip
    assert found["drafts"] == sum(s.drafted[0] for s in stats) and found["n"] == 3
    assert found["value"] == sum(s.accepted[0] for s in stats) / found["drafts"]
    assert mtp_acceptance(tiny_model(num_nextn_predict_layers=0), prompts) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"num_beams": 4},
        {"cache_implementation": "static"},
        {"output_hidden_states": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"stop_strings": ["x"]},
        {"penalty_alpha": 0.6},
        {"max_time": 0.0},
    ],
    ids=str,
)
def test_generation_settings_do_not_change_what_is_measured(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("DECODED", 3), ("REPEATS", 1)):
        monkeypatch.setattr(speed, name, value)
    model = tiny_model(use_cache=settings.get("use_cache", True))
    prompts = [tokens(12, vocab=300, seed=i) for i in range(2)]
    expected = mtp_acceptance(model, prompts, max_new_tokens=8)
    model.generation_config = own = GenerationConfig(**settings)
    assert mtp_acceptance(model, prompts, max_new_tokens=8) == expected
    lengths: list[int] = []
    forward = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    throughput(model, prompts[0])
    forward.remove()
    assert lengths == 2 * [12] + 2 * [12, 1, 1, 1] and model.generation_config is own
