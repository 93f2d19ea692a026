"""A fine-tuning run: data, model, resumable training, evaluation, what changed, and one record of it all."""

import dataclasses
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.utils import logging

from ..data import PackedDataset, heldout_bits_per_byte, load_corpus, pack_documents, tokenize_documents
from ..durable import write_json
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS
from ..process import environment, keep_freed_memory, locked, peak_memory, reset_peak_memory, say, stop_signals
from .baselines import classification_baselines
from .build import as_language_model, build_model, load_tokenizer
from .changes import expert_movement, summarize_movement
from .evaluate import classification_results, evaluate_task, retrieval_results
from .examples import Examples, make_examples
from .frozen import HeadOnFeatures, stack_features, with_features
from .lora import report_trainable, trainable_table
from .outputs import (
    INPUTS,
    RECIPE,
    RECORD,
    base_digest,
    check_inputs,
    check_recipe,
    clear,
    read_record,
    save,
    save_merged,
)
from .recipe import FinetuneRecipe
from .tasks import TASKS, TaskData, load_task
from .trainer import (
    AdaptiveLearningRate,
    Clock,
    FinetuneTrainer,
    PlainLines,
    StopOnSignal,
    classification_loss,
    newest_checkpoint,
    remove_unfinished,
)
from .unfreezing import ProgressiveUnfreezing

# Forgetting is measured on this much of the general text.
GENERAL_TOKENS = 16_384
GENERAL_LENGTH = 256
TASK_FIELDS = ("name", "kind", "labels", "licence", "source", "sha256")


def finetune(recipe: FinetuneRecipe, restart: bool = False) -> dict[str, Any]:
    """Run `recipe`, or go on with it, and return the run's record (also in `output_dir/run.json`).

    Leaves in `output_dir`: `adapter/` (PEFT's format, with LoRA) and `merged/`, or `model/` without LoRA, each with
    the tokenizer, and `run.json`; while running, `checkpoints/`. Ctrl-C and SIGTERM save after the current step, and
    the same recipe goes on from there. A finished run is not repeated unless `restart`; `merged/` is written from
    `adapter/` if `merge` was set since.

    Raises:
        ValueError: the recipe, the data, the base or a saved state is not usable, or the data or the base is no longer
            what the run was begun with; names the field or the file.
        InterruptedError: stopped by a signal, after saving.
    """
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    keep_freed_memory()
    main = int(os.environ.get("RANK", 0)) == 0  # torchrun's; transformers joins the processes later
    with locked(output) if main else nullcontext():
        if not restart and (output / RECORD).exists():
            record = read_record(output / RECORD, recipe)
            return _finished(recipe, output, record) if main else {}
        if not restart and newest_checkpoint(output / "checkpoints"):
            check_recipe(output, recipe)
        return _run(recipe, output, restart)


def _finished(recipe: FinetuneRecipe, output: Path, record: dict[str, Any]) -> dict[str, Any]:
    merge = recipe.merge and "adapter" in record["artifacts"] and "merged" not in record["artifacts"]
    if merge or (output / INPUTS).exists():
        task = _load_task(recipe)
        check_inputs(output, recipe, {"task": task.sha256, "base": base_digest(recipe.base)})
    if merge:
        adapter = output / "adapter"
        if not adapter.is_dir():
            raise ValueError(f"{adapter}: not found, merge needs it; --restart trains it again")
        say(f"{output}: writing merged/ from adapter/")
        model = build_model(recipe, task, load_tokenizer(recipe.base), _device())
        model.load_adapter(str(adapter), "default")
        record["artifacts"]["merged"] = save_merged(recipe, model)
        write_json(output / RECORD, record)
    say(f"{output}: this run is finished ({record['steps']} steps); --restart trains it again")
    return record


def _run(recipe: FinetuneRecipe, output: Path, restart: bool) -> dict[str, Any]:
    start = time.monotonic()
    device = _device()
    reset_peak_memory(device)
    task = _load_task(recipe)
    tokenizer = load_tokenizer(recipe.base)
    say(f"{task.name}: {len(task.train)} / {len(task.validation)} / {len(task.test)} rows, {task.kind}")
    examples = make_examples(recipe, task, tokenizer)
    notes = [*task.notes, *examples.notes]
    for note in notes:
        say(f"  {note}")
    general = _general_text(recipe, tokenizer)
    made_with = {**environment(device), "peft": peft.__version__}  # now: sources may change while this runs
    model = build_model(recipe, task, tokenizer, device)
    inputs = {"task": task.sha256, "base": base_digest(recipe.base)}  # now all of the base is on this machine
    resume = None if restart else newest_checkpoint(output / "checkpoints")
    if resume is not None:
        check_inputs(output, recipe, inputs)
    trained = report_trainable(model)
    say(trainable_table(trained))
    forgetting: dict[str, float] = {}
    if general is not None:
        forgetting["before"] = _general_bits(model, recipe, general)
    before = None if recipe.method != "full" else _expert_weights(model)

    trainer, stop = _trainer(recipe, output, model, task, examples, tokenizer)
    if trainer.is_world_process_zero():  # only now, when nothing can be wrong any more
        if restart:
            clear(output)
        remove_unfinished(output / "checkpoints")
        if resume is None:
            write_json(output / INPUTS, inputs)
            write_json(output / RECIPE, dataclasses.asdict(recipe))
    with stop_signals() as received:
        stop.received = received
        if resume is not None:
            say(f"continuing from {resume}")
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if stop.stopped:
        raise InterruptedError(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved")
    if not trainer.is_world_process_zero():
        return {}

    say("evaluating")
    results = evaluate_task(model, task, tokenizer, recipe.max_length, recipe.generate)
    if general is not None:
        forgetting["after"] = _general_bits(model, recipe, general)
    baselines = {}
    if recipe.compare and task.kind == "classification":
        for baseline in classification_baselines(task, recipe.seed):
            baselines[baseline.name] = classification_results(task, baseline.validation, baseline.test)
    if recipe.compare and task.kind == "chat" and recipe.generate:
        baselines["nearest training answer"] = retrieval_results(task, tokenizer, recipe.max_length, recipe.generate)
    movement = summarize_movement(expert_movement(model, before))
    (clock,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    record = {
        "finished": True,
        "recipe": dataclasses.asdict(recipe),
        "task": {
            **{name: getattr(task, name) for name in TASK_FIELDS},
            "notes": notes,
            "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
            "left_out": examples.left_out,
            "truncated": examples.truncated,
        },
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "learning_rate": recipe.peak_learning_rate(),
        "batch_size": recipe.rows_per_step(),
        "train_tokens": examples.tokens,
        "train_seconds": round(clock.seconds, 1),
        "history": [row for row in trainer.state.log_history if "train_runtime" not in row],
        "trainable": trained,
        "test": results,
        "baselines": baselines,
        "general_bits_per_byte": forgetting,
        "experts": movement,
        "peak_memory_bytes": peak_memory(device),
        "environment": made_with,
        "date": time.strftime("%Y-%m-%d"),
    }
    record["artifacts"] = save(recipe, model)
    record["total_seconds"] = round(time.monotonic() - start, 1)
    write_json(output / RECORD, record)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return read_record(output / RECORD, recipe)  # as a later call returns it: lists for tuples


def _load_task(recipe: FinetuneRecipe) -> TaskData:
    options = dict(recipe.task_options)
    if recipe.generate and recipe.task not in TASKS:
        options["text_answers"] = True
    return load_task(recipe.task, recipe.data, limit=recipe.limit, **options)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's; transformers does so only later
    return torch.device("cuda")


def _trainer(
    recipe: FinetuneRecipe,
    output: Path,
    model: nn.Module,
    task: TaskData,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[FinetuneTrainer, StopOnSignal]:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = recipe.rows_per_step()
    if rows % ranks:
        raise ValueError(f"recipe: batch_size is {rows}, allowed are multiples of the number of processes, {ranks}")
    share = rows // ranks
    micro = min(recipe.micro_batch_size or share, share)
    if share % micro:
        raise ValueError(f"recipe: micro_batch_size is {micro}, allowed are divisors of a rank's share, {share} rows")
    train, validation, collate = examples.train, examples.validation, examples.collate
    if recipe.method == "head":
        say("computing the frozen base's features")
        train, validation = (with_features(model, rows, tokenizer.pad_token_id) for rows in (train, validation))
        model, collate = HeadOnFeatures(model), stack_features
    steps_per_epoch = math.ceil(len(train) / rows)
    steps = recipe.max_steps or max(1, round(steps_per_epoch * recipe.epochs))
    every = max(1, min(steps, math.ceil(steps_per_epoch / recipe.evaluations_per_epoch)))
    schedule = recipe.schedule()
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=recipe.peak_learning_rate(),
        warmup_steps=math.ceil(steps * recipe.warmup_ratio),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.grad_clip,
        eval_strategy="steps" if validation else "no",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=bool(validation),
        metric_for_best_model="eval_loss" if validation else None,
        greater_is_better=False if validation else None,
        prediction_loss_only=True,
        label_names=["labels"],
        logging_steps=max(1, steps // 50),
        seed=recipe.seed,
        data_seed=recipe.seed,
        train_sampling_strategy="group_by_length" if task.kind == "classification" else "random",
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=True,
        ddp_find_unused_parameters=schedule is not None,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        report_to=recipe.report_to or "none",
    )
    if arguments.n_gpu > 1:  # Trainer would multiply the rows per step by it
        launch = f"start it with torchrun --nproc-per-node {arguments.n_gpu}, or name one in CUDA_VISIBLE_DEVICES"
        raise ValueError(f"found {arguments.n_gpu} GPUs in one process, allowed is one: {launch}")
    stop = StopOnSignal([])
    callbacks: list[TrainerCallback] = [stop, Clock(), PlainLines()]
    if schedule is not None:
        callbacks.append(ProgressiveUnfreezing(schedule))
    if recipe.adaptive_lr:
        callbacks.append(AdaptiveLearningRate())
    if recipe.patience is not None and validation:
        callbacks.append(EarlyStoppingCallback(recipe.patience))
    trainer = FinetuneTrainer(
        model,
        arguments,
        collate,
        train,
        validation or None,
        compute_loss_func=classification_loss if task.kind == "classification" else None,
        callbacks=callbacks,
        layer_decay=1.0 if schedule is None else schedule.layer_decay,
        min_lr_ratio=recipe.min_lr_ratio,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, stop


def _general_text(recipe: FinetuneRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedDataset, int] | None:
    """Held-out general text, packed for evaluation, and its size in bytes."""
    if recipe.general_text is None:
        return None
    corpus = load_corpus(recipe.general_text)
    documents, size = [], 0
    for document, ids in zip(
        corpus.heldout, tokenize_documents((d.text for d in corpus.heldout), tokenizer), strict=True
    ):
        documents.append(ids)
        size += len(document.text.encode())
        if sum(map(len, documents)) >= GENERAL_TOKENS:
            break
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    packed = pack_documents(documents, GENERAL_LENGTH, bos_id=bos, eos_id=eos, evaluation=True, context=64)
    return packed, size


def _general_bits(model: nn.Module, recipe: FinetuneRecipe, general: tuple[PackedDataset, int]) -> float:
    packed, size = general
    rows = max(1, GENERAL_TOKENS // packed.stride)
    language = as_language_model(model, recipe.base)
    return heldout_bits_per_byte(language, packed, size, document_mask=True, max_rows=rows)


def _expert_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    names = tuple(f".experts.{name}" for name in EXPERT_WEIGHTS)
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if name.endswith(names)}
