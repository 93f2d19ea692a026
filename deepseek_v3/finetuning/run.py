"""A fine-tuning run: data, model, resumable training, evaluation, what changed, and one record of it all."""

import dataclasses
import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.utils import logging

from ..configuration import DeepseekV3Config
from ..data import PackedDataset, heldout_bits_per_byte, load_corpus, pack_documents, tokenize_documents
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS
from ..process import environment, keep_freed_memory, locked, say, stop_signals
from .baselines import classification_baselines
from .batches import encode_classification, pack, pad_classification, stack
from .build import as_language_model, build_model, load_tokenizer, unwrapped
from .changes import expert_movement, summarize_movement
from .evaluate import classification_results, encode_rows, evaluate_task, retrieval_results
from .frozen import HeadOnFeatures, stack_features, with_features
from .lora import report_trainable, trainable_table
from .quantized_merge import merge_quantized
from .recipe import FinetuneRecipe
from .tasks import TaskData, load_task
from .trainer import (
    AdaptiveLearningRate,
    Clock,
    FinetuneTrainer,
    PlainLines,
    StopOnSignal,
    classification_loss,
    newest_checkpoint,
)
from .unfreezing import ProgressiveUnfreezing

RECORD = "run.json"
RECIPE = "recipe.json"
# Forgetting is measured on this much of the general text.
GENERAL_TOKENS = 16_384
GENERAL_LENGTH = 256
TASK_FIELDS = ("name", "kind", "labels", "licence", "source", "sha256", "notes")
# What may change between the parts of one run.
FREE = ("output_dir", "micro_batch_size", "report_to", "merge", "gradient_checkpointing")


def finetune(recipe: FinetuneRecipe, restart: bool = False) -> dict[str, Any]:
    """Run `recipe`, or go on with it, and return the run's record (also in `output_dir/run.json`).

    Leaves in `output_dir`: `adapter/` (PEFT's format, with LoRA) and `merged/`, or `model/` without LoRA, each with
    the tokenizer, and `run.json`; while running, `checkpoints/`. Ctrl-C and SIGTERM save after the current step, and
    the same recipe goes on from there. A finished run is not repeated unless `restart`.

    Raises:
        ValueError: the recipe, the data, the base or a saved state is not usable; names the field or the file.
        InterruptedError: stopped by a signal, after saving.
    """
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    keep_freed_memory()
    main = int(os.environ.get("RANK", 0)) == 0  # torchrun's; transformers joins the processes later
    with locked(output) if main else nullcontext():
        if not restart and (output / RECORD).exists():
            record = _read_record(output / RECORD, recipe)
            if not main:
                return {}
            say(f"{output}: this run is finished ({record['steps']} steps); --restart trains it again")
            return record
        if not restart and newest_checkpoint(output / "checkpoints"):
            _check_same(_read(output / RECIPE), recipe, output / RECIPE)
        return _run(recipe, output, restart)


def _run(recipe: FinetuneRecipe, output: Path, restart: bool) -> dict[str, Any]:
    start = time.monotonic()
    task = load_task(recipe.task, recipe.data, limit=recipe.limit, **recipe.task_options)
    tokenizer = load_tokenizer(recipe.base)
    say(f"{task.name}: {len(task.train)} / {len(task.validation)} / {len(task.test)} rows, {task.kind}")
    for note in task.notes:
        say(f"  {note}")
    general = _general_text(recipe, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made_with = {**environment(device), "peft": peft.__version__}  # now: sources may change while this runs
    model = build_model(recipe, task, tokenizer, device)
    trained = report_trainable(model)
    say(trainable_table(trained))
    forgetting: dict[str, float] = {}
    if general is not None:
        forgetting["before"] = _general_bits(model, recipe, general)
    before = None if recipe.method != "full" else _expert_weights(model)

    trainer, stop = _trainer(recipe, output, model, task, tokenizer)
    if trainer.is_world_process_zero():  # only now, when nothing of the recipe can be wrong any more
        if restart:
            _clear(output)
        (output / RECIPE).write_text(json.dumps(dataclasses.asdict(recipe), indent=2))
    with stop_signals() as received:
        stop.received = received
        resume = None if restart else newest_checkpoint(output / "checkpoints")
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
        baselines["nearest training answer"] = retrieval_results(task, recipe.generate)
    movement = summarize_movement(expert_movement(model, before))
    (clock,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    record = {
        "finished": True,
        "recipe": dataclasses.asdict(recipe),
        "task": {
            **{name: getattr(task, name) for name in TASK_FIELDS},
            "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        },
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "learning_rate": recipe.peak_learning_rate(),
        "batch_size": recipe.rows_per_step(),
        "train_tokens": sum(len(row["input_ids"]) for row in trainer.train_dataset),
        "train_seconds": round(clock.seconds, 1),
        "history": [row for row in trainer.state.log_history if "train_runtime" not in row],
        "trainable": trained,
        "test": results,
        "baselines": baselines,
        "general_bits_per_byte": forgetting,
        "experts": movement,
        "peak_memory_bytes": _peak_memory(device),
        "environment": made_with,
        "date": time.strftime("%Y-%m-%d"),
    }
    record["artifacts"] = _save(recipe, output, model, tokenizer)
    record["total_seconds"] = round(time.monotonic() - start, 1)
    part = output / f".{RECORD}.tmp"
    part.write_text(json.dumps(record, indent=2))
    part.rename(output / RECORD)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return _read(output / RECORD)  # as a later call returns it: lists for tuples


def _trainer(
    recipe: FinetuneRecipe, output: Path, model: nn.Module, task: TaskData, tokenizer: PreTrainedTokenizerBase
) -> tuple[FinetuneTrainer, StopOnSignal]:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = recipe.rows_per_step()
    if rows % ranks:
        raise ValueError(f"recipe: batch_size is {rows}, allowed are multiples of the number of processes, {ranks}")
    share = rows // ranks
    micro = min(recipe.micro_batch_size or share, share)
    if share % micro:
        raise ValueError(f"recipe: micro_batch_size is {micro}, allowed are divisors of a rank's share, {share} rows")
    if not task.train:
        raise ValueError(f"task {task.name}: found no training rows; it can only be evaluated")
    train, validation, collate = _datasets(recipe, task, tokenizer)
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


def _datasets(recipe: FinetuneRecipe, task: TaskData, tokenizer: PreTrainedTokenizerBase):
    """Training and validation examples, and their collator."""
    order = np.random.default_rng(0).permutation(len(task.validation))[: recipe.validation_rows]
    splits = (task.train, [task.validation[i] for i in sorted(order)])
    if task.kind == "classification":
        assert task.labels is not None
        labels, length = task.labels, recipe.max_length
        both = [encode_classification(rows, tokenizer, labels, length) for rows in splits]
        return *both, lambda batch: pad_classification(batch, tokenizer.pad_token_id)
    both = [
        pack(encode_rows(rows, task, tokenizer), recipe.max_length, tokenizer.pad_token_id, split=task.kind == "text")
        for rows in splits
    ]
    return *both, stack


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


def _save(
    recipe: FinetuneRecipe, output: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, int]]:
    """Write what was trained; each folder appears whole. Returns the folders' sizes in bytes."""
    original = DeepseekV3Config.from_pretrained(recipe.base)
    config = unwrapped(model).config
    for name in ("mtp_loss_coef", "seq_balance_coef", "use_cache"):  # off while training
        setattr(config, name, getattr(original, name))

    def write(name: str, written: nn.Module) -> None:
        part, final = output / f".{name}.tmp", output / name
        shutil.rmtree(part, ignore_errors=True)
        written.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)

    if recipe.method == "lora":
        write("adapter", model)
        if recipe.merge:
            quantized = recipe.quantize != "none"
            write("merged", merge_quantized(model) if quantized else model.merge_and_unload())
    else:
        write("model", model)
    return {
        path.name: {"bytes": sum(file.stat().st_size for file in path.iterdir())}
        for path in (output / name for name in ("adapter", "merged", "model"))
        if path.is_dir()
    }


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, allowed is an object")
    return content


def _read_record(path: Path, recipe: FinetuneRecipe) -> dict[str, Any]:
    """The record of a finished run of this recipe, or ValueError."""
    record = _read(path)
    saved = record.get("recipe")
    if not isinstance(saved, dict) or not record.get("finished"):
        raise ValueError(f"{path}: not the record of a finished run; --restart trains it again")
    _check_same(saved, recipe, path)
    return record


def _check_same(saved: dict[str, Any], recipe: FinetuneRecipe, where: Path) -> None:
    for name, value in dataclasses.asdict(recipe).items():
        if name not in FREE and saved.get(name) != value:
            raise ValueError(
                f"{where}: a run with {name} = {saved.get(name)!r}, the recipe has {value!r}; use another output_dir"
            )


def _clear(output: Path) -> None:
    for name in ("checkpoints", "adapter", "merged", "model"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (RECORD, RECIPE):
        (output / name).unlink(missing_ok=True)
