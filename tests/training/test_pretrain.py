"""The main job end to end: what it leaves, that resuming changes no bit, what it refuses, and a golden run."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from deepseek_v3 import DeepseekV3ForCausalLM, durable
from deepseek_v3.data import load_corpus, tokenize_documents
from deepseek_v3.optimizer import MasterAdamW
from deepseek_v3.tokenization import train_tokenizer
from deepseek_v3.training import Recipe, checkpoint, pretrain, resuming
from deepseek_v3.training.monitor import Monitor
from tests.training.helpers import (
    fast_finish,
    metrics,
    pretrain_module,
    run_ranks,
    same_weights,
    signal_after,
    tiny_recipe,
    weights,
    without,
    write_corpus,
)

ROOT = Path(__file__).resolve().parents[2]


# --- a run from beginning to end


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict]:
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"), corpus, compare=True, eval_every=3, log_every=2)
    with pytest.MonkeyPatch.context() as patch:  # the one run whose samples are generated, only fewer of them
        original = pretrain_module.write_samples
        patch.setattr(pretrain_module, "write_samples", lambda *args: original(*args, max_new_tokens=8))
        return recipe, pretrain(recipe)


def test_what_a_run_leaves(finished: tuple[Recipe, dict], corpus: Path) -> None:
    recipe, record = finished
    output = Path(recipe.output_dir)
    found = {path.name for path in output.iterdir()} - {".lock"}
    assert found == {"model", "tokenizer", "metrics.jsonl", "loss.png", "load.png", "samples.txt", "run.json"}
    for image in ("loss.png", "load.png"):
        assert (output / image).read_bytes().startswith(b"\x89PNG") and (output / image).stat().st_size > 5000
    samples = (output / "samples.txt").read_text()
    assert samples.count("=== greedy") == samples.count("=== sampled") == 4
    assert json.loads((output / "run.json").read_text()) == record

    assert record["finished"] is True and record["steps"] == 6 and record["tokens"] == 6 * 4 * 32
    text = load_corpus(corpus, heldout_fraction=0.3)
    assert record["corpus"]["sha256"] == text.sha256
    assert record["corpus"]["train_documents"] == len(text.train) > 3
    assert record["corpus"]["heldout_bytes"] == sum(len(d.text.encode()) for d in text.heldout)
    assert set(record["baselines_bits_per_byte"]) == {"gzip", "5-gram", "dense"}
    values = [record["heldout_bits_per_byte"], *record["baselines_bits_per_byte"].values()]
    assert all(0.5 < value < 8 for value in values) and len(set(values)) == 4
    assert record["mtp"]["drafts"] > 0 and 0 <= record["mtp"]["acceptance"] <= 1
    violations = [row["max_violation"] for row in metrics(output) if "ce_loss" in row]
    assert record["load"]["max_violation_peak"] == max(violations) > 0
    assert record["load"]["max_violation_last"] == violations[-1] and 0 <= record["load"]["dead_experts_last"] <= 1


def test_metrics_of_a_run(finished: tuple[Recipe, dict]) -> None:
    recipe, record = finished
    rows = metrics(Path(recipe.output_dir))
    losses = [row for row in rows if "ce_loss" in row]
    assert [(row["step"], row["tokens"]) for row in losses] == [(2, 256), (4, 512), (6, 768)]
    assert losses[0]["ce_loss"] == pytest.approx(math.log(512), rel=0.02)
    assert losses[-1]["ce_loss"] < losses[0]["ce_loss"]
    for row in losses:
        combined = row["ce_loss"] + 0.3 * row["mtp_loss"] + 1e-4 * row["balance_loss"]
        assert row["loss"] == pytest.approx(combined, rel=1e-6)
        assert 0 <= row["load_entropy"] <= 1 and row["max_violation"] >= 0
    # evaluations stand at the step at which they were made, between two logged ones here
    notes = [row for row in rows if "ce_loss" not in row]
    assert [row["step"] for row in notes] == [3, 6]
    assert notes[1]["heldout_bits_per_byte"] == record["heldout_bits_per_byte"]


def test_the_record_s_figures_follow_from_the_files(finished: tuple[Recipe, dict], corpus: Path) -> None:
    """Held-out bits per byte and parameters, again from nothing but the folder and the text."""
    recipe, record = finished
    folder = Path(recipe.output_dir) / "model"
    model, tokenizer = DeepseekV3ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = load_corpus(corpus, heldout_fraction=0.3)
    stream: list[int] = []
    for ids in tokenize_documents((d.text for d in text.heldout), tokenizer):
        stream += [tokenizer.bos_token_id, *ids.tolist(), tokenizer.eos_token_id]
    nats, half = 0.0, recipe.sequence_length // 2
    for start in range(
        0, len(stream), half
    ):  # each token with at least half a row before it, and none predicted twice
        row = torch.tensor([stream[start : start + 2 * half]])
        with torch.no_grad():
            scores = model.eval()(row).logits.double().log_softmax(-1)[0]
        for i in range(half if start else 1, row.shape[1]):
            nats -= float(scores[i - 1, row[0, i]]) if row[0, i] != tokenizer.bos_token_id else 0.0
    size = sum(len(d.text.encode()) for d in text.heldout)
    assert record["heldout_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)

    total = {p.data_ptr(): p.numel() for p in model.parameters()}
    mtp = sum(p.numel() for p in model.model.layers[3:].parameters())
    assert record["parameters"]["mtp"] == mtp
    assert record["parameters"]["total"] == sum(total.values()) - mtp


def test_the_checkpoint_loads_in_stock_transformers_and_ours(finished: tuple[Recipe, dict]) -> None:
    folder = Path(finished[0].output_dir) / "model"
    stock, info = StockForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ours, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(3, 500, (2, 24))
    with torch.no_grad():
        expected, found = stock.eval()(ids).logits, ours.eval()(ids).logits
    assert found.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, buffer in ours.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert buffer.dtype == torch.float32 and buffer.any()
            if "layers.3" not in name:
                assert torch.equal(buffer, stock.get_buffer(name))
    assert len(ours.mtp_layers) == 1
    output = ours.train()(input_ids=ids, labels=ids)
    untrained = DeepseekV3ForCausalLM(ours.config).train()(input_ids=ids, labels=ids)
    assert output.mtp_loss.isfinite() and output.mtp_loss != untrained.mtp_loss
    assert ours.state_dict()["model.layers.3.eh_proj.weight"].equal(
        weights(folder.parent)["model.layers.3.eh_proj.weight"]
    )


def test_a_finished_run_is_not_repeated(finished: tuple[Recipe, dict], capsys: pytest.CaptureFixture) -> None:
    recipe, record = finished
    output = Path(recipe.output_dir)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name not in (".lock", output.name)}
    assert pretrain(recipe) == record
    assert "this run is finished (6 steps)" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    changed = Recipe(**{**vars(recipe), "log_every": 5, "keep_checkpoints": 2})  # what changes no figure may change
    assert pretrain(changed) == record
    with pytest.raises(
        ValueError, match=r"run\.json: a finished run with learning_rate = 0\.003, the recipe has 0\.1"
    ):
        pretrain(Recipe(**{**vars(recipe), "learning_rate": 0.1}))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true}', '{"recipe": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, corpus: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / "run.json")):
        pretrain(tiny_recipe(tmp_path, corpus))


def test_restart_trains_again(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path, corpus, steps=2)
    (tmp_path / ".model.tmp-999999").mkdir()  # of a killed run
    (tmp_path / ".run.json.tmp-999999").touch()
    pretrain(recipe)
    assert not list(tmp_path.glob(".*.tmp-*"))
    first = weights(tmp_path)
    other = Recipe(**{**vars(recipe), "seed": 1})
    with pytest.raises(ValueError, match="seed"):
        pretrain(other)
    assert pretrain(other, restart=True)["recipe"]["seed"] == 1
    assert not all(torch.equal(first[name], tensor) for name, tensor in weights(tmp_path).items())
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 2]  # nothing of the first run


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer", "model"])
def test_a_restart_killed_while_it_clears_is_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for folder in ("checkpoints", "tokenizer", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run.json").touch()
    (tmp_path / "metrics.jsonl").touch()

    def killed(path: Path, **_: Any) -> None:
        if path.name == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        resuming.clear(tmp_path, everything=True)
    assert not (tmp_path / "run.json").exists()


def test_the_model_is_on_the_disk_before_its_states_go(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    events: list[str] = []
    for module, function in ((durable, "sync"), (pretrain_module.shutil, "rmtree")):
        original = getattr(module, function)

        def log(path: Path, *_: Any, original: Any = original, **options: Any) -> None:
            name = re.sub(r"tmp-\d+", "tmp", str(Path(path).relative_to(tmp_path)))
            events.append(f"{original.__name__} {name}")
            original(path, **options)

        monkeypatch.setattr(module, function, log)
    pretrain(tiny_recipe(tmp_path, corpus, steps=1, save_every=1))
    gone = events.index("rmtree checkpoints")
    for path in (".model.tmp/model.safetensors", ".model.tmp/config.json", ".model.tmp", "."):
        assert f"sync {path}" in events[:gone], (path, events)


def test_metrics_survive_a_resume_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    before = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 9))
    path.write_text(before)

    def full(path: Path, content: str, **_: Any) -> None:
        with path.open("w"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Monitor(path, 10, 4, 1, 3.0, "step")
    assert path.read_text() == before


def test_a_restart_that_cannot_begin_removes_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path, corpus, steps=1)
    pretrain(recipe)
    with pytest.raises(ValueError, match="no such file"):
        pretrain(Recipe(**{**vars(recipe), "data": str(tmp_path / "mistyped")}), restart=True)
    assert (tmp_path / "model" / "model.safetensors").exists() and (tmp_path / "run.json").exists()


# --- resuming

# Everything that a state has to carry: dropout (random numbers), accumulation, moments, the routing bias, averages
# that are only half collected when the run stops, and data that go on in the second epoch.
LONG = {
    "steps": 12,
    "batch_size": 8,
    "micro_batch_size": 4,
    "log_every": 5,
    "eval_every": 4,
    "learning_rate": 0.01,
    "sequence_length": 48,
    "model": {"vocab_size": 512, "attention_dropout": 0.1, "bias_update_speed": 0.01},
}
STOP = 7


def run_recorded(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict]:
    """The record, and the optimizer's state at the end."""
    last: dict = {}
    original = pretrain_module.save_state

    def save_state(root, step, save_model, optimizer_state, *rest):
        if step == recipe.steps:
            last.update(optimizer_state)
        return original(root, step, save_model, optimizer_state, *rest)

    monkeypatch.setattr(pretrain_module, "save_state", save_state)
    record = pretrain(recipe)
    return record, last


def tensors(tree: object, prefix: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in tensors(value, f"{prefix}.{key}").items()}
    if isinstance(tree, list | tuple):
        return tensors(dict(enumerate(tree)), prefix)
    return {prefix: tree}


def same(one: dict, two: dict) -> bool:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys() and len(a) > 100
    a = {key: value for key, value in a.items() if not key.endswith("seconds")}
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runs(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> types.SimpleNamespace:
    """In fp32 and bf16: an uninterrupted run, and the folder of one that was stopped after 7 of its 12 steps."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {**LONG, "dtype": request.param}
    with pytest.MonkeyPatch.context() as patch:
        fast_finish(patch)
        whole = tiny_recipe(folder / "whole", corpus, **options)
        record, state = run_recorded(whole, patch)
        signal_after(patch, STOP)
        with pytest.raises(InterruptedError, match=f"stopped at step {STOP} of 12.*step-{STOP}"):
            pretrain(tiny_recipe(folder / "stopped", corpus, **options))
    return types.SimpleNamespace(
        whole=folder / "whole", stopped=folder / "stopped", options=options, record=record, state=state
    )


def resume(runs, output: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, **changes) -> tuple[dict, dict]:
    shutil.copytree(runs.stopped, output, dirs_exist_ok=True)
    fast_finish(monkeypatch)
    return run_recorded(tiny_recipe(output, corpus, **{**runs.options, **changes}), monkeypatch)


def test_resuming_is_bitwise(runs, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight, routing bias, moment, master and logged figure equals those of the run without a stop."""
    data = load_corpus(corpus, heldout_fraction=0.3)
    assert runs.record["tokens"] > data.train_bytes / 1.5  # more than an epoch
    record, state = resume(runs, tmp_path, corpus, monkeypatch)
    assert same_weights(tmp_path, runs.whole)
    assert weights(tmp_path)["model.layers.3.mlp.gate.e_score_correction_bias"].any()
    assert same(state, runs.state)
    assert metrics(tmp_path) == metrics(runs.whole)
    assert [row["step"] for row in metrics(tmp_path)] == [4, 5, 8, 10, 12, 12]
    ignored = ("recipe", "train_seconds")
    assert {k: v for k, v in record.items() if k not in ignored} == {
        k: v for k, v in runs.record.items() if k not in ignored
    }


@pytest.mark.parametrize("forgotten", ["moments", "masters", "bias", "data", "random"])
def test_resuming_without_a_part_of_the_state_differs(
    runs, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The control: each of these would have been noticed above."""
    if forgotten in ("moments", "masters"):
        load = MasterAdamW.load_state_dict
        monkeypatch.setattr(MasterAdamW, "load_state_dict", lambda self, s: load(self, without(s, forgotten)))
    elif forgotten == "bias":
        original = DeepseekV3ForCausalLM.from_pretrained.__func__

        def without_bias(cls, *args, **kwargs):
            model = original(cls, *args, **kwargs)
            for name, buffer in model.named_buffers():
                buffer.zero_() if name.endswith("bias") else None
            return model

        monkeypatch.setattr(DeepseekV3ForCausalLM, "from_pretrained", classmethod(without_bias))
    elif forgotten == "data":
        loop = sys.modules["deepseek_v3.training.loop"]
        batches = loop.iterate_batches
        monkeypatch.setattr(loop, "iterate_batches", lambda *a, **k: batches(*a, **{**k, "start_step": 0}))
    else:
        loop = sys.modules["deepseek_v3.training.loop"]
        monkeypatch.setattr(loop, "seed_step", lambda *_: torch.manual_seed(1))
    _, state = resume(runs, tmp_path, corpus, monkeypatch)
    harmless = forgotten == "masters" and runs.options["dtype"] == "fp32"  # there the weights are the masters
    assert same_weights(tmp_path, runs.whole) == same(state, runs.state) == harmless


@pytest.mark.parametrize("runs", ["fp32"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.02}, "learning_rate = 0.01, the recipe has 0.02"),
        ({"steps": 13}, "steps = 12, the recipe has 13"),
        ({"model": {**LONG["model"], "n_routed_experts": 16}}, "model = .*n_routed_experts"),
        ({"model": {**LONG["model"], "vocab_size": 400}}, "model = .*512.*400"),
        ({"sequence_length": 32}, "sequence_length = 48, the recipe has 32"),
        ({"heldout_fraction": 0.31}, "heldout_fraction"),
        ({"seed": 3}, "seed = 0, the recipe has 3"),
    ],
)
def test_a_changed_recipe_is_refused(
    runs, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=f"step-{STOP}: saved with {message}"):
        resume(runs, tmp_path, corpus, monkeypatch, **change)
    assert json.loads((tmp_path / "checkpoints" / f"step-{STOP}" / "manifest.json").read_text())["step"] == STOP


@pytest.mark.parametrize("runs", ["fp32"], indirect=True)
def test_a_changed_corpus_is_refused(runs, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(corpus, tmp_path / "text")
    shutil.copytree(runs.stopped, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / f"step-{STOP}" / "manifest.json"
    file = next(iter(sorted((tmp_path / "text").glob("*.txt"))))
    text = file.read_text()
    file.write_text(text + ".")
    fast_finish(monkeypatch)
    moved = {"data": str(corpus)}
    original = pretrain_module.load_corpus
    monkeypatch.setattr(pretrain_module, "load_corpus", lambda _, **k: original(tmp_path / "text", **k))
    recipe = tiny_recipe(tmp_path / "run", corpus, **{**runs.options, **moved})
    with pytest.raises(ValueError, match=rf"step-{STOP}: the text of .*text has changed.*SHA-256"):
        pretrain(recipe)
    assert state.exists()
    file.write_text(text)  # the text as it was: the run goes on
    pretrain(recipe)
    assert same_weights(tmp_path / "run", runs.whole)


def test_a_bad_state_falls_back_or_stops(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fast_finish(monkeypatch)
    options = {"steps": 5, "save_every": 1, "keep_checkpoints": 2}
    recipe = tiny_recipe(tmp_path / "a", corpus, **options)
    with monkeypatch.context() as patch:
        signal_after(patch, 4)
        with pytest.raises(InterruptedError):
            pretrain(recipe)
    states = tmp_path / "a" / "checkpoints"
    assert sorted(path.name for path in states.iterdir()) == ["step-3", "step-4"]
    for name in ("step-3", "step-4"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    (states / "step-4" / "optimizer.pt").write_bytes(b"")
    pretrain(recipe)
    assert "step-4/optimizer.pt: 0 of" in capsys.readouterr().out
    pretrain(tiny_recipe(tmp_path / "whole", corpus, **options))
    assert same_weights(tmp_path / "a", tmp_path / "whole")

    bad = tmp_path / "step-3"
    for path in bad.glob("checkpoints/*/optimizer.pt"):
        path.unlink()
    with pytest.raises(ValueError, match="no usable state"):
        pretrain(tiny_recipe(bad, corpus, **options))
    assert not (bad / "model").exists() and len(list(bad.glob("checkpoints/step-*"))) == 2


def test_a_tokenizer_of_another_text_is_not_taken_over(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped before its first state leaves a tokenizer; the next may have another corpus or vocabulary."""
    fast_finish(monkeypatch)
    other = write_corpus(tmp_path / "other")
    for file in other.glob("*.txt"):
        file.write_text(file.read_text().translate(str.maketrans("abcdefghij", "klmnopqrst")))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny_recipe(tmp_path / "run", other))
    assert (tmp_path / "run" / "tokenizer").exists()
    for model in ({"vocab_size": 512}, {"vocab_size": 400}):
        recipe = tiny_recipe(tmp_path / "run", corpus, steps=1, model=model)
        pretrain(recipe, restart=model["vocab_size"] == 400)
        pretrain(tiny_recipe(tmp_path / f"fresh{model['vocab_size']}", corpus, steps=1, model=model))
        found = [(tmp_path / name / "model" / "tokenizer.json") for name in ("run", f"fresh{model['vocab_size']}")]
        assert found[0].read_text() == found[1].read_text()


def stopped(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int = 1) -> Path:
    """Stop `recipe` after `step`; returns the saved state."""
    with monkeypatch.context() as patch:
        signal_after(patch, step)
        with pytest.raises(InterruptedError):
            pretrain(recipe)
    return Path(recipe.output_dir) / "checkpoints" / f"step-{step}"


def test_resuming_keeps_the_kernels(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint holds them; the dense twin has them too."""
    fast_finish(monkeypatch)
    kernels = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    recipe = tiny_recipe(tmp_path, corpus, steps=2, compare=True, model={"vocab_size": 512, **kernels})
    fit_model, seen = pretrain_module.fit, []

    def noted(model: DeepseekV3ForCausalLM, *rest: object) -> int:
        seen.append((model.config._attn_implementation, model.config._experts_implementation))
        return fit_model(model, *rest)

    monkeypatch.setattr(pretrain_module, "fit", noted)
    stopped(recipe, monkeypatch)
    pretrain(recipe)
    assert seen == [("eager", "batched_mm")] * 3  # at the start, resumed, the twin


def test_a_changed_tokenizer_is_refused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_finish(monkeypatch)
    texts = [document.text for document in load_corpus(corpus, heldout_fraction=0.3).train]
    folder = tmp_path / "tokenizer"
    train_tokenizer(texts, 512).save_pretrained(folder)
    recipe = tiny_recipe(tmp_path / "run", corpus, steps=2, tokenizer=str(folder))
    state = stopped(recipe, monkeypatch)
    good = {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    train_tokenizer(texts[:2], 512).save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{state}: the tokenizer has changed .*sha256"):
        pretrain(recipe)
    (folder / "tokenizer.json").write_text(good["tokenizer.json"])
    config = json.loads(good["tokenizer_config.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|EOT|>"}))
    with pytest.raises(ValueError, match="the tokenizer has changed .*'eos_token_id': 1.*'eos_token_id': 5"):
        pretrain(recipe)

    # a state that says nothing of its tokenizer
    manifest = json.loads((state / "manifest.json").read_text())
    del manifest["sha256"], manifest["record"]["tokenizer"]
    (state / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}))
    (folder / "tokenizer_config.json").write_text(good["tokenizer_config.json"])
    assert pretrain(recipe)["finished"]


def test_auto_stays_the_dtype_of_the_state(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may go on where `auto` means another dtype; its optimizer's state is of the first."""
    fast_finish(monkeypatch)
    pretrain(tiny_recipe(tmp_path / "whole", corpus, steps=2))
    recipe = tiny_recipe(tmp_path / "run", corpus, steps=2, dtype="auto")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    stopped(recipe, monkeypatch)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pretrain(recipe)["dtype"] == "float32"
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_stopping_in_the_comparison_keeps_the_model(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense twin comes last; a stop there costs nothing of the model, and the record is the same in the end."""
    fast_finish(monkeypatch)
    options = {"compare": True, "steps": 4}
    expected = pretrain(tiny_recipe(tmp_path / "whole", corpus, **options))
    recipe = tiny_recipe(tmp_path / "run", corpus, **options)
    with monkeypatch.context() as patch:
        signal_after(patch, 2, title="dense")
        with pytest.raises(InterruptedError, match="dense"):
            pretrain(recipe)
    saved = tmp_path / "run" / "checkpoints" / "step-4" / "manifest.json"
    with monkeypatch.context() as patch:  # a state that is there already is not written again
        patch.setattr(pretrain_module, "save_state", lambda *_: pytest.fail("saved again"))
        assert saved.exists()
        record = pretrain(recipe)
    assert (tmp_path / "run" / "load.png").exists()
    ignored = ("recipe", "train_seconds")
    assert {k: v for k, v in record.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_signal_in_the_last_step_stops_before_the_evaluation(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path, corpus, steps=3)
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        patch.setattr(pretrain_module, "heldout_bits_per_byte", lambda *_, **__: pytest.fail("evaluated"))
        with pytest.raises(InterruptedError, match="step 3 of 3"):
            pretrain(recipe)
    assert pretrain(recipe)["steps"] == 3


def test_two_signals_are_as_good_as_one_and_handlers_come_back(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGINT)
        signal_after(patch, 2, signal.SIGTERM)
        with pytest.raises(InterruptedError, match="stopped at step 2"):
            pretrain(tiny_recipe(tmp_path, corpus))
        signal_after(patch, 3, signal.SIGTERM)
        signal_after(patch, 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C stops at once
            pretrain(tiny_recipe(tmp_path, corpus))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_signal_while_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python refuses a print inside a print of the same stream, with an exception in the middle of the training."""

    class Stream:
        busy = False

        def write(self, text: str) -> int:
            if self.busy:
                raise RuntimeError("reentrant call")
            Stream.busy = True
            if text.strip():
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(100):  # the handler runs between two bytecodes
                    pass
            Stream.busy = False
            return len(text)

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Stream())
    with pretrain_module.stop_signals() as stop:
        print("hello")
    assert stop == [signal.SIGTERM]


def test_two_runs_on_one_folder(tmp_path: Path, corpus: Path) -> None:
    recipe = tiny_recipe(tmp_path, corpus)
    with (tmp_path / ".lock").open("w") as holder:
        holder.write("pid 123 on elsewhere")
        holder.flush()
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=rf"{tmp_path}: in use by another run \(pid 123 on elsewhere\)"):
            pretrain(recipe)
        with pytest.raises(ValueError, match="in use"):
            pretrain(recipe, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_lock_is_held_while_training_and_no_longer(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path, corpus, steps=2)
    refused: list[str] = []
    update = Monitor.update

    def second_run(self, result) -> None:
        update(self, result)
        with pytest.raises(ValueError, match=f"pid {os.getpid()} on ") as caught:
            pretrain(recipe)
        refused.append(str(caught.value))

    monkeypatch.setattr(Monitor, "update", second_run)
    pretrain(recipe)
    assert len(refused) == 2
    assert pretrain(recipe)["finished"]


# --- several processes


def test_two_ranks_train_as_one_process(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole job, tokenizer, comparison and files included: same batches, same losses, one set of files."""
    fast_finish(monkeypatch)
    options = {"compare": True, "steps": 4, "micro_batch_size": 1, "save_every": 2}
    recipe = tiny_recipe(tmp_path / "two", corpus, **options)
    saved: list[int] = []

    def job() -> None:
        original = pretrain_module.save_state
        pretrain_module.save_state = lambda *args: (saved.append(args[1]), original(*args))[1]
        record = pretrain(recipe)
        assert bool(record) == (dist.get_rank() == 0), record
        assert saved == ([2, 4] if dist.get_rank() == 0 else [])
        assert bool(pretrain(recipe)) == (dist.get_rank() == 0)  # finished

    assert run_ranks(tmp_path / "ranks", job) == ["done", "done"]
    expected = pretrain(tiny_recipe(tmp_path / "one", corpus, **options))
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["tokens"] == expected["tokens"]
    assert record["heldout_bits_per_byte"] == pytest.approx(expected["heldout_bits_per_byte"], rel=1e-4)
    assert record["baselines_bits_per_byte"] == pytest.approx(expected["baselines_bits_per_byte"], rel=1e-4)
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], rtol=0, atol=2e-3)


def test_a_signal_to_one_rank_stops_both(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path / "run", corpus)
    update = Monitor.update

    def job() -> None:
        def signal_rank_1(self, result) -> None:
            update(self, result)
            if result.step == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        Monitor.update = signal_rank_1
        pretrain(recipe)

    outcomes = run_ranks(tmp_path / "ranks", job, seconds=30)
    assert [outcome.partition(",")[0] for outcome in outcomes] == ["InterruptedError: stopped at step 3 of 6"] * 2
    pretrain(recipe)  # goes on, in one process now
    pretrain(tiny_recipe(tmp_path / "whole", corpus))
    for one, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_a_batch_that_the_ranks_cannot_share(tmp_path: Path) -> None:
    """Said before the corpus is read."""
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "missing", batch_size=3)
    for outcome in run_ranks(tmp_path / "ranks", lambda: pretrain(recipe), seconds=30):
        assert outcome.startswith("ValueError: recipe: batch_size is 3, allowed are multiples")


@pytest.mark.slow
def test_torchrun_trains_as_one_process(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts it: two processes of the command."""
    options = ["--data", str(corpus), "--preset", "tiny", "--steps", "3"]
    for item in ("heldout_fraction=0.3", "batch_size=4", "sequence_length=32", "log_every=1", "compare=false"):
        options += ["--set", item]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        command = [sys.executable, *launcher, "-m", "deepseek_v3.cli", "pretrain", *options]
        command += ["--output-dir", str(tmp_path / name), "--set", "dtype=fp32", "--set", "model={vocab_size: 512}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert (tmp_path / "two" / "model" / "README.md").exists()
