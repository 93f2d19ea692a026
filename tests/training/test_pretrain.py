"""The main job end to end: what it leaves, restarts, and several processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from deepseek_v3 import DeepseekV3ForCausalLM, durable
from deepseek_v3.data import load_corpus, pack_documents, tokenize_documents
from deepseek_v3.training import Recipe, pretrain, resuming
from deepseek_v3.training.evaluation import mtp_acceptance
from deepseek_v3.training.monitor import Monitor
from tests.training.helpers import (
    fast_finish,
    metrics,
    pretrain_module,
    run_ranks,
    tiny_model,
    tiny_recipe,
    weights,
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


def test_drafts_continue_the_halves_of_held_out_rows(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not whole documents, whose continuation is their end; the record holds no NaN where nothing was drafted."""
    fast_finish(monkeypatch)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(pretrain_module, "mtp_acceptance", lambda model, prompts: seen.append(prompts))
    record = pretrain(tiny_recipe(tmp_path, corpus, steps=1))
    assert record["mtp"] is None and '"mtp": null' in (tmp_path / "run.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenize_documents((d.text for d in load_corpus(corpus, heldout_fraction=0.3).heldout), tokenizer)
    marks = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    rows = pack_documents(tokens, 32, **marks, evaluation=True, context=16)
    assert len(rows) > 20
    expected = torch.stack([rows[i]["input_ids"][:16] for i in range(min(32, len(rows)))])
    assert len(seen) == 1 and torch.equal(seen[0], expected)


def test_mtp_acceptance_where_nothing_is_drafted() -> None:
    model, prompts = tiny_model(), torch.arange(2, 26).view(3, 8)
    assert mtp_acceptance(model, prompts, max_new_tokens=6)["drafts"] > 0
    model.generation_config.eos_token_id = list(range(64))  # every text ends at once
    assert mtp_acceptance(model, prompts, max_new_tokens=6) is None


def test_a_figure_that_is_no_number_is_no_record(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    monkeypatch.setattr(pretrain_module, "heldout_bits_per_byte", lambda *_, **__: math.nan)
    with pytest.raises(ValueError, match="not JSON compliant"):
        pretrain(tiny_recipe(tmp_path, corpus, steps=1, save_every=1))
    assert not (tmp_path / "run.json").exists()


def test_layers_that_rest_are_neither_measured_nor_counted(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    monkeypatch.setattr(pretrain_module, "mtp_acceptance", lambda *_: pytest.fail("drafted"))
    model = {"vocab_size": 512, "mtp_loss_coef": 0.0}
    record = pretrain(tiny_recipe(tmp_path, corpus, steps=1, batch_size=16, model=model))
    assert record["mtp"] is None and record["load"]["dead_experts_last"] == 0
    assert [row["dead_experts"] for row in metrics(tmp_path) if "ce_loss" in row] == [0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"batch_size": 1}, 1), ({"batch_size": 8, "micro_batch_size": 3}, 3), ({"batch_size": 64}, 16)],
)
def test_evaluation_takes_no_more_rows_than_training(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], expected: int
) -> None:
    fast_finish(monkeypatch)
    rows: list[int] = []
    monkeypatch.setattr(
        pretrain_module, "heldout_bits_per_byte", lambda *_, batch_size, **__: rows.append(batch_size) or 2.0
    )
    pretrain(tiny_recipe(tmp_path, corpus, steps=2, eval_every=1, **options))
    assert rows == [expected] * 2


def test_text_files_are_utf_8_everywhere(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the locale says something else."""
    fast_finish(monkeypatch)
    monkeypatch.setattr(pretrain_module, "write_samples", lambda *_: "\u00e9\u6f22")
    write, in_the_locale_s = Path.write_text, []

    def note(path: Path, content: str, encoding: str | None = None, **options: Any) -> int:
        if encoding is None:
            in_the_locale_s.append(path.name)
        return write(path, content, encoding=encoding, **options)

    monkeypatch.setattr(Path, "write_text", note)
    pretrain(tiny_recipe(tmp_path, corpus, steps=2, save_every=1))
    assert in_the_locale_s == []
    assert (tmp_path / "samples.txt").read_bytes() == "\u00e9\u6f22".encode()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true}', '{"recipe": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, corpus: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / "run.json")):
        pretrain(tiny_recipe(tmp_path, corpus))


def test_the_states_of_a_finished_run_go(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a run that was killed between its record and their removal."""
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path, corpus, steps=1)
    record = pretrain(recipe)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert pretrain(recipe) == json.loads(json.dumps(record))
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / "model").exists()


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
