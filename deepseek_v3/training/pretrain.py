"""The main job: corpus, tokenizer, model, resumable training, evaluation beside baselines, one record of it all."""

import dataclasses
import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from ..configuration import DeepseekV3Config, num_parameters
from ..data import Corpus, heldout_bits_per_byte, load_corpus
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..process import any_rank, environment, keep_freed_memory, locked, say, stop_signals
from ..tokenization import check_vocab
from .balance import routers
from .checkpoint import load_optimizer_state, newest_state, save_state
from .compare import baselines, dense_twin, training_flops
from .evaluation import mtp_acceptance, write_samples
from .loop import StepResult, fit
from .monitor import Monitor, plot_load, plot_loss, read_metrics
from .optimizer import build_optimizer
from .recipe import Recipe
from .text import TextData, prepare_text

RECORD = "run.json"
# A prompt of the held-out text for samples and MTP acceptance, in characters.
PROMPT_CHARS = 400


def pretrain(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Run `recipe`, or go on with it, and return the run's record (also in `output_dir/run.json`).

    Leaves in `output_dir`: `model/` (checkpoint and tokenizer), `metrics.jsonl`, `loss.png`, `load.png`,
    `samples.txt`, `run.json`; while running, `checkpoints/step-N/`. Ctrl-C and SIGTERM save after the current step;
    the same recipe then continues from there, bit for bit. A finished run is not repeated unless `restart`.

    Raises:
        ValueError: the recipe, the data or a saved state is not usable; names the field or the file.
        InterruptedError: stopped by a signal, after saving.
    """
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    keep_freed_memory()
    # without being told of the CPU, torchrun's processes would each be a run of their own there
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    main = accelerator.is_main_process
    with locked(output) if main else nullcontext():
        record = {} if restart else _read_record(output, recipe)
        if record:
            say(f"{output}: this run is finished ({record['steps']} steps); --restart trains it again")
            return record if main else {}
        corpus = load_corpus(
            recipe.data, heldout=recipe.heldout, text_field=recipe.text_field, heldout_fraction=recipe.heldout_fraction
        )
        if main:
            _clear(output, everything=restart)
        accelerator.wait_for_everyone()
        found = newest_state(output / "checkpoints", say)
        if found is not None:
            _check_same(found[1]["record"], corpus, recipe, found[0])
        data = prepare_text(recipe, output, corpus, accelerator)
        return _run(recipe, output, data, found, accelerator)


def _run(
    recipe: Recipe,
    output: Path,
    data: TextData,
    found: tuple[Path, dict[str, Any]] | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train from the state `found`, or from the start, to the end; then everything else of `pretrain`."""
    main = accelerator.is_main_process
    made_with = environment(accelerator.device)  # now: sources may change while this runs
    dtype = _resolve_dtype(recipe, accelerator.device)
    tokenizer = data.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = recipe.config(**special, eos_token_id=tokenizer.eos_token_id)
    check_vocab(tokenizer, config.vocab_size)

    if found is None:
        torch.manual_seed(recipe.seed)
        model, start = DeepseekV3ForCausalLM(config).to(dtype), 0
    else:
        model = DeepseekV3ForCausalLM.from_pretrained(found[0] / "model", dtype=dtype)
        start = found[1]["step"]
    model.to(accelerator.device)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model.parameters(), recipe)

    count = num_parameters(config)
    say(
        f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts, {count.total / 1e6:.1f}M parameters "
        f"({count.activated / 1e6:.1f}M per token) + {count.mtp / 1e6:.1f}M for MTP, {dtype}".replace("torch.", "")
    )
    monitor = Monitor(
        output / "metrics.jsonl" if main else None, recipe.steps, start, recipe.log_every, data.bytes_per_token, "step"
    )
    recent: list[torch.Tensor] = []
    if found is not None:
        state = load_optimizer_state(found[0])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
        recent = state["recent_counts"]
        say(f"continuing at step {start} from {found[0]}")
    states = output / "checkpoints"
    provenance = {"recipe": _fixed(recipe), "corpus_sha256": data.corpus.sha256}

    def save_model(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save(step: int) -> None:
        if main:
            state = {"optimizer": optimizer.state_dict(), "monitor": monitor.state_dict(), "recent_counts": recent}
            save_state(states, step, save_model, state, provenance, recipe.keep_checkpoints)
        accelerator.wait_for_everyone()

    with stop_signals() as stop:

        def on_step(result: StepResult) -> bool:
            step = result.step + 1
            monitor.update(result)
            recent.append(result.counts)
            del recent[: -max(50, min(1000, recipe.steps // 10))]
            if step % recipe.eval_every == 0 and step < recipe.steps:
                part = heldout_bits_per_byte(
                    model, data.heldout, data.corpus.heldout_bytes, recipe.document_mask, max_rows=64
                )
                monitor.note(heldout_part_bits_per_byte=part)
            stopping = any_rank(stop)
            if step < recipe.steps and (stopping or step % recipe.save_every == 0):
                save(step)
            return stopping

        done = fit(model, optimizer, data.train, recipe, accelerator, on_step, start)
        if done == recipe.steps > start:
            save(done)
        stopping = any_rank(stop)
    monitor.close()
    if stopping:
        raise InterruptedError(f"stopped at step {done} of {recipe.steps}, saved in {states / f'step-{done}'}")
    results = _evaluate(recipe, output, data, model, monitor) if main else {}
    results["environment"] = made_with
    if recipe.compare:  # every rank takes part
        dense = _train_dense(recipe, config, data, model.dtype, accelerator)
        if main:
            results["baselines_bits_per_byte"]["dense"] = dense
    record = _finish(recipe, output, data, model, monitor, recent, results) if main else {}
    accelerator.wait_for_everyone()
    return record


def _evaluate(
    recipe: Recipe, output: Path, data: TextData, model: DeepseekV3ForCausalLM, monitor: Monitor
) -> dict[str, Any]:
    """What the record holds of the model's quality, all but the dense twin's; writes `samples.txt`."""
    corpus, config = data.corpus, model.config
    say("evaluating on held-out text")
    bits = heldout_bits_per_byte(model, data.heldout, corpus.heldout_bytes, recipe.document_mask)
    monitor.note(heldout_bits_per_byte=bits)
    prompts = [document.text[:PROMPT_CHARS] for document in corpus.heldout]
    acceptance = mtp_acceptance(model, data.tokenizer, prompts[:32]) if config.num_nextn_predict_layers else None
    (output / "samples.txt").write_text(write_samples(model, data.tokenizer, [p[:120] for p in prompts[:4]]))
    references = {}
    if recipe.compare:
        references = baselines(corpus, data.train_tokens, data.heldout_tokens, config.vocab_size)
    return {"heldout_bits_per_byte": bits, "baselines_bits_per_byte": references, "mtp": acceptance}


def _finish(
    recipe: Recipe,
    output: Path,
    data: TextData,
    model: DeepseekV3ForCausalLM,
    monitor: Monitor,
    recent: list[torch.Tensor],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Write the figures, the model and the record."""
    corpus, config = data.corpus, model.config
    metrics = read_metrics(output / "metrics.jsonl")
    rows = [row for row in metrics if "ce_loss" in row]
    names = [name.split(".mlp")[0].removeprefix("model.") for name in routers(model)]
    plot_loss(output / "loss.png", metrics, results["baselines_bits_per_byte"])
    counts = torch.stack(recent).sum(0) if recent else torch.zeros(0, 0)
    if counts.numel():
        plot_load(output / "load.png", rows, counts, names)
    parameters = num_parameters(config)
    record = {
        "finished": True,
        "recipe": dataclasses.asdict(recipe),
        "steps": recipe.steps,
        "tokens": monitor.tokens,
        "train_seconds": round(monitor.seconds, 1),
        "train_flops": training_flops(config, recipe.sequence_length) * monitor.tokens,
        "parameters": {"total": parameters.total, "activated": parameters.activated, "mtp": parameters.mtp},
        "dtype": str(model.dtype).removeprefix("torch."),
        "corpus": {
            "name": corpus.name,
            "licence": corpus.licence,
            "sha256": corpus.sha256,
            "train_documents": len(corpus.train),
            "train_bytes": corpus.train_bytes,
            "heldout_documents": len(corpus.heldout),
            "heldout_bytes": corpus.heldout_bytes,
        },
        **results,
        "load": {
            "max_violation_peak": max((r["max_violation"] for r in rows if "max_violation" in r), default=None),
            "max_violation_last": rows[-1].get("max_violation"),
            "dead_experts_last": float((counts == 0).double().mean()) if counts.numel() else None,
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    final = output / "model"
    temporary = output / f".model.tmp-{os.getpid()}"
    model.save_pretrained(temporary)
    data.tokenizer.save_pretrained(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    part = output / f".{RECORD}.tmp-{os.getpid()}"
    part.write_text(json.dumps(record, indent=2))
    part.rename(output / RECORD)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return record


def _train_dense(
    recipe: Recipe, config: DeepseekV3Config, data: TextData, dtype: torch.dtype, accelerator: Accelerator
) -> float:
    """Held-out bits per byte of the dense twin: same tokens in the same order, same schedule, same FLOPs per token."""
    say("training a dense model of equal compute")
    torch.manual_seed(recipe.seed)
    model = DeepseekV3ForCausalLM(dense_twin(config)).to(accelerator.device, dtype)
    optimizer = build_optimizer(model.parameters(), recipe)
    every = max(recipe.log_every, recipe.steps // 10)
    monitor = Monitor(None, recipe.steps, 0, every, data.bytes_per_token, "dense")
    with stop_signals() as stop:

        def on_step(result: StepResult) -> bool:
            monitor.update(result)
            return any_rank(stop)

        done = fit(model, optimizer, data.train, recipe, accelerator, on_step)
    monitor.close()
    if done < recipe.steps:
        raise InterruptedError("stopped while training the dense model; the trained model's state is saved")
    return heldout_bits_per_byte(model, data.heldout, data.corpus.heldout_bytes, recipe.document_mask)


def _resolve_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.dtype != "auto":
        return torch.bfloat16 if recipe.dtype == "bf16" else torch.float32
    if device.type == "cpu":  # without matrix units for it, bf16 is the slower one
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.bfloat16


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """What may not change between the parts of one run."""
    free = ("output_dir", "log_every", "eval_every", "save_every", "keep_checkpoints", "compare", "micro_batch_size")
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in free}


def _difference(saved: dict[str, Any], recipe: Recipe) -> str | None:
    """The first field of `recipe` that may not change and differs from the saved one, in words."""
    for name, value in _fixed(recipe).items():
        if saved.get(name) != value:
            return f"{name} = {saved.get(name)!r}, the recipe has {value!r}"
    return None


def _check_same(saved: dict[str, Any], corpus: Corpus, recipe: Recipe, where: Path) -> None:
    if difference := _difference(saved["recipe"], recipe):
        raise ValueError(f"{where}: saved with {difference}")
    if saved["corpus_sha256"] != corpus.sha256:
        raise ValueError(
            f"{where}: the text of {corpus.name} has changed since this state was saved (SHA-256 differs)"
        )


def _read_record(output: Path, recipe: Recipe) -> dict[str, Any]:
    path = output / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        saved = record["recipe"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no run's record ({type(error).__name__}: {error})") from None
    if difference := _difference(dict(saved), recipe):
        raise ValueError(f"{path}: a finished run with {difference}; use another output_dir")
    return record


def _clear(output: Path, everything: bool) -> None:
    """Remove what a killed run left half-written, and with `everything` the run itself."""
    for leftover in output.glob(".*.tmp-*"):
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    if not everything:
        return
    for name in ("checkpoints", "tokenizer", "model"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (RECORD, "metrics.jsonl"):
        (output / name).unlink(missing_ok=True)
