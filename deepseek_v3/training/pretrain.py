"""The main job: corpus, tokenizer, model, resumable training, evaluation beside baselines, one record of it all."""

import dataclasses
import os
import shutil
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers.utils import logging

from .. import durable
from ..configuration import DeepseekV3Config, num_parameters
from ..data import heldout_bits_per_byte, load_corpus
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..process import any_rank, environment, keep_freed_memory, locked, say, stop_signals
from .balance import LoadStatistics, routers
from .checkpoint import load_optimizer_state, newest_state, save_state, set_aside
from .compare import baselines, dense_twin, training_flops
from .evaluation import mtp_acceptance, write_samples
from .loop import StepResult, fit
from .monitor import Monitor, plot_load, plot_loss, read_metrics
from .optimizer import MasterAdamW, build_optimizer
from .recipe import Recipe, kernels
from .resuming import (
    RECORD,
    check_alike,
    check_same,
    check_same_tokenizer,
    check_shared,
    clear,
    fixed_fields,
    read_record,
)
from .text import TextData, load_tokenizer, prepare_text

SAMPLES, SAMPLE_CHARS = 4, 120  # continued beginnings of held-out documents
PROMPTS, PROMPT_TOKENS = 32, 64  # held-out rows whose first half, at most so long, is continued for MTP acceptance
# The main process trains the tokenizer, saves and evaluates alone, and the others wait for it in a collective.
LONGEST_WAIT = timedelta(days=1)


def pretrain(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Run `recipe`, or go on with it, and return the run's record (also in `output_dir/run.json`).

    Leaves in `output_dir`: `model/` (checkpoint and tokenizer), `metrics.jsonl`, `loss.png`, `load.png`,
    `samples.txt`, `run.json`; while running, `checkpoints/step-N/`. Ctrl-C and SIGTERM save after the current step;
    the same recipe then continues from there, bit for bit. A finished run is not repeated unless `restart`.

    Raises:
        ValueError: the recipe, the data, the launcher's settings or a saved state is not usable; names the field or
            the file.
        InterruptedError: stopped by a signal, after saving.
    """
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    keep_freed_memory()
    accelerator = data_parallel()
    main = accelerator.is_main_process
    with locked(output) if main else nullcontext():
        record = {} if restart else read_record(output, recipe)
        check_shared(output, "finished" if record else "not finished")
        if record:
            if main:  # of a run that was killed before it removed them
                shutil.rmtree(output / "checkpoints", ignore_errors=True)
            say(f"{output}: this run is finished ({record['steps']} steps); --restart trains it again")
            return record if main else {}
        if recipe.batch_size % accelerator.num_processes:
            raise ValueError(
                f"recipe: batch_size is {recipe.batch_size}, allowed are multiples of the number of processes, "
                f"{accelerator.num_processes}"
            )
        corpus = load_corpus(
            recipe.data, heldout=recipe.heldout, text_field=recipe.text_field, heldout_fraction=recipe.heldout_fraction
        )
        if main:
            clear(output, everything=restart)
        accelerator.wait_for_everyone()
        found = newest_state(output / "checkpoints", say)
        check_shared(output, "no saved state" if found is None else found[0].name)
        if found is not None:
            check_same(found[1]["record"], corpus, recipe, found[0])
        tokenizer, identity = load_tokenizer(recipe, output, corpus, accelerator)
        check_alike(recipe, corpus, identity)
        if found is not None:
            check_same_tokenizer(found[1]["record"], identity, found[0])
            if main:
                set_aside(output / "checkpoints", found[0])
        provenance = {"recipe": fixed_fields(recipe), "corpus_sha256": corpus.sha256, "tokenizer": identity}
        return _run(recipe, output, prepare_text(recipe, corpus, tokenizer), found, provenance, accelerator)


def data_parallel() -> Accelerator:
    """accelerate's view of the launched processes, without what its saved defaults (`accelerate config`) would change.

    Raises:
        ValueError: the launcher asks for more than data parallelism.
    """
    # without being told of the CPU, torchrun's processes would each be a run of their own there
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        dynamo_backend="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # on CPUs accelerate does not say so itself
        kind = DistributedType.FSDP
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ValueError(
            f"accelerate: distributed_type is {kind.value}, allowed are NO and MULTI_GPU, MULTI_CPU and their like: "
            "pretraining is data-parallel only (see `accelerate config`, or launch with torchrun)"
        )
    return accelerator


def _run(
    recipe: Recipe,
    output: Path,
    data: TextData,
    found: tuple[Path, dict[str, Any]] | None,
    provenance: dict[str, Any],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train from the state `found`, or from the start, to the end; then everything else of `pretrain`."""
    main = accelerator.is_main_process
    made_with = environment(accelerator.device)  # now: sources may change while this runs
    tokenizer = data.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if special["pad_token_id"] in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special["pad_token_id"] = None  # nothing is padded here, and the embedding of a padding token never trains
    config = recipe.config(**special)
    model, monitor, recent = _train(recipe, config, output, data, found, provenance, accelerator)
    results = _evaluate(recipe, output, data, model, monitor, accelerator) if main else {}
    results["environment"] = made_with
    if recipe.compare:  # every rank takes part
        model.to("cpu" if main else "meta")  # one model at a time on the device
        twin = _train_dense(recipe, config, data, model.dtype, accelerator)
        if main:
            results["baselines_bits_per_byte"]["dense"] = _heldout_bits(recipe, data, twin, accelerator)
    record = _finish(recipe, output, data, model, monitor, recent, results) if main else {}
    accelerator.wait_for_everyone()
    return record


def _train(
    recipe: Recipe,
    config: DeepseekV3Config,
    output: Path,
    data: TextData,
    found: tuple[Path, dict[str, Any]] | None,
    provenance: dict[str, Any],
    accelerator: Accelerator,
) -> tuple[DeepseekV3ForCausalLM, Monitor, list[torch.Tensor]]:
    """The trained model, its monitor, and the expert loads `[L, E]` of each of the last steps."""
    main = accelerator.is_main_process
    if found is None:
        torch.manual_seed(recipe.seed)
        model, start = DeepseekV3ForCausalLM(config).to(_resolve_dtype(recipe, accelerator.device)), 0
    else:  # in the state's dtype, which `auto` meant where the run began
        model = DeepseekV3ForCausalLM.from_pretrained(found[0] / "model", dtype="auto", **kernels(config))
        start = found[1]["step"]
    optimizer = _ready(model, recipe, accelerator)

    count = num_parameters(config)
    dtype = str(model.dtype).removeprefix("torch.")
    say(
        f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts, {count.total / 1e6:.1f}M parameters "
        f"({count.activated / 1e6:.1f}M per token) + {count.mtp / 1e6:.1f}M for MTP, {dtype}"
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
        del state  # the optimizer has its own copy
        say(f"continuing at step {start} from {found[0]}")
    states = output / "checkpoints"

    def save_model(folder: Path) -> None:
        model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)

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
            if main and step % recipe.eval_every == 0 and step < recipe.steps:
                bits = _heldout_bits(recipe, data, model, accelerator, max_rows=64)
                monitor.note(heldout_part_bits_per_byte=bits)
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
    return model, monitor, recent


def _ready(model: DeepseekV3ForCausalLM, recipe: Recipe, accelerator: Accelerator) -> MasterAdamW:
    """Place `model` and set it up as the recipe says; returns its optimizer."""
    model.to(accelerator.device)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return build_optimizer(model.parameters(), recipe)


def _heldout_bits(
    recipe: Recipe,
    data: TextData,
    model: DeepseekV3ForCausalLM,
    accelerator: Accelerator,
    max_rows: int | None = None,
) -> float:
    """With no more rows at a time than a pass of training takes."""
    share = recipe.batch_size // accelerator.num_processes
    rows = min(16, recipe.micro_batch_size or share, share)
    n_bytes, documents = data.corpus.heldout_bytes, recipe.document_mask
    return heldout_bits_per_byte(model, data.heldout, n_bytes, documents, batch_size=rows, max_rows=max_rows)


def _evaluate(
    recipe: Recipe,
    output: Path,
    data: TextData,
    model: DeepseekV3ForCausalLM,
    monitor: Monitor,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What the record holds of the model's quality, all but the dense twin's; writes `samples.txt`."""
    corpus, config = data.corpus, model.config
    metrics = output / "metrics.jsonl"
    if not any("ce_loss" in row for row in read_metrics(metrics)):
        raise ValueError(f"{metrics}: found no line of training, allowed is the file of this run; or use --restart")
    say("evaluating on held-out text")
    bits = _heldout_bits(recipe, data, model, accelerator)
    monitor.note(heldout_bits_per_byte=bits)
    acceptance = None
    if config.num_nextn_predict_layers and config.mtp_loss_coef:  # without a loss they were not trained
        rows = data.heldout.rows(range(min(PROMPTS, len(data.heldout))))["input_ids"]
        acceptance = mtp_acceptance(model, rows[:, : min(PROMPT_TOKENS, recipe.sequence_length // 2)])
    prompts = [document.text[:SAMPLE_CHARS] for document in corpus.heldout[:SAMPLES]]
    durable.write_text(output / "samples.txt", write_samples(model, data.tokenizer, prompts))
    references = {}
    if recipe.compare:
        references = baselines(data, config.vocab_size)
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
            "split": corpus.split,
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
            "dead_experts_last": LoadStatistics.of(counts).dead if counts.numel() else None,
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    final = output / "model"
    temporary = output / f".model.tmp-{os.getpid()}"
    model.save_pretrained(temporary)
    data.tokenizer.save_pretrained(temporary)
    durable.sync_tree(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    durable.write_json(output / RECORD, record, allow_nan=False)
    durable.sync(output)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return record


def _train_dense(
    recipe: Recipe, config: DeepseekV3Config, data: TextData, dtype: torch.dtype, accelerator: Accelerator
) -> DeepseekV3ForCausalLM:
    """The trained dense twin: same tokens in the same order, same schedule, same FLOPs per token."""
    say("training a dense model of equal compute")
    torch.manual_seed(recipe.seed)
    model = dense_twin(config).to(dtype)
    optimizer = _ready(model, recipe, accelerator)
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
    return model


def _resolve_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.dtype != "auto":
        return torch.bfloat16 if recipe.dtype == "bf16" else torch.float32
    if device.type == "cpu":  # without matrix units for it, bf16 is the slower one
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.bfloat16
