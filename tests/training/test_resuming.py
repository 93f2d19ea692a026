"""Stopping and resuming a run: no bit changes, what is refused, signals, and the lock of its folder."""

import fcntl
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.data import load_corpus
from deepseek_v3.optimizer import MasterAdamW
from deepseek_v3.tokenization import train_tokenizer
from deepseek_v3.training import Recipe, checkpoint, pretrain
from deepseek_v3.training.monitor import Monitor
from tests.training.helpers import (
    fast_finish,
    metrics,
    pretrain_module,
    same_weights,
    signal_after,
    tiny_recipe,
    weights,
    without,
    write_corpus,
)

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
    with monkeypatch.context() as patch:
        signal_after(patch, 4)
        with pytest.raises(InterruptedError):  # goes on from step 3 and saves step 4 again
            pretrain(recipe)
    assert "step-4/optimizer.pt: 0 of" in capsys.readouterr().out
    assert sorted(path.name for path in states.iterdir()) == [".step-4.refused", "step-3", "step-4"]
    pretrain(recipe)
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


def test_a_finished_training_without_its_metrics_is_named(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is evaluated: the record holds figures from them."""
    fast_finish(monkeypatch)
    recipe = tiny_recipe(tmp_path, corpus, steps=2)
    state, metrics_file = stopped(recipe, monkeypatch, step=2), tmp_path / "metrics.jsonl"
    content = metrics_file.read_text()
    metrics_file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "heldout_bits_per_byte", lambda *_, **__: pytest.fail("evaluated"))
        with pytest.raises(ValueError, match=f"{metrics_file}: found no line of training"):
            pretrain(recipe)
    assert state.exists()
    metrics_file.write_text(content)
    assert pretrain(recipe)["finished"]


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
