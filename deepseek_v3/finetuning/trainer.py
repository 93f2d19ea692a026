"""transformers' `Trainer` with what fine-tuning this architecture needs: fp32 master weights, learning rates by depth,
a learning rate that follows the validation loss, an order of the data and a stop between steps that resuming keeps."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data import IGNORE_INDEX
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..optimizer import MasterAdamW, warmup_cosine
from ..process import any_rank, say
from .build import unwrapped
from .unfreezing import parameter_groups


class AdaptiveLearningRate(TrainerCallback, ExportableState):
    """Scales the schedule's learning rate by what validation and gradients say.

    An evaluation whose loss is not below the best so far halves the factor, down to 1/16. A step whose gradient norm
    is over `spike` times the median of the last 50 counts a tenth: its direction is one outlying batch's.
    """

    def __init__(self, spike: float = 4.0) -> None:
        self.spike = spike
        self.factor = 1.0
        self.best: float | None = None
        self.norms: list[float] = []
        self.grad_norm = 0.0  # of the present step, before clipping; set by the trainer

    def state(self) -> dict[str, Any]:
        remembered = {"factor": self.factor, "best": self.best, "norms": self.norms}
        return {"args": {"spike": self.spike}, "attributes": remembered}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        loss = metrics.get("eval_loss")
        if loss is None:
            return
        if self.best is None or loss < self.best:
            self.best = loss
        else:
            self.factor = max(self.factor / 2, 1 / 16)

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        usual = median(self.norms) if len(self.norms) >= 10 else math.inf
        self.norms = [*self.norms, self.grad_norm][-50:]
        scale = self.factor * (0.1 if self.grad_norm > self.spike * usual else 1.0)
        for group in optimizer.param_groups:
            group["lr"] *= scale  # the scheduler sets it anew after the step


class StopOnSignal(TrainerCallback):
    """Saves after the step in which a signal came, then stops; `stopped` says so."""

    def __init__(self, received: list[int]) -> None:
        self.received = received
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if any_rank(self.received) and state.global_step < state.max_steps:
            self.stopped = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.stopped:  # only now: what was saved of the control must not stop the run that resumes
            control.should_training_stop = True


class PlainLines(TrainerCallback):
    """Progress where there is no terminal for `Trainer`'s bar."""

    def on_log(self, args, state, control, logs, **kwargs):
        if args.disable_tqdm and state.is_world_process_zero and "train_runtime" not in logs:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, float) and k != "epoch")
            say(f"finetune {state.global_step:>6}/{state.max_steps}  {shown}")


class Clock(TrainerCallback, ExportableState):
    """`seconds` of training, those before a resumption included; complete when training has ended."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds + time.monotonic() - self.start}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds += time.monotonic() - self.start


class EpochOrder(Sampler[int]):
    """The order of the rows in an epoch: a function of seed and epoch alone, and not of other random numbers, of where
    a run was resumed, or of how many processes and micro-batches share a step.

    With `lengths` rows of similar length share a step of `rows_per_step`.
    """

    def __init__(self, count: int, seed: int, rows_per_step: int, lengths: Sequence[int] | None = None) -> None:
        self.count, self.seed, self.rows_per_step, self.lengths = count, seed, rows_per_step, lengths
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(2**20 * self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.rows_per_step, generator=generator))


def classification_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy in nats, summed and divided by the rows of the whole step.

    transformers' classifiers take the mean over a micro-batch instead, which `Trainer` then does not divide by the
    number of micro-batches and multiplies by that of the processes.
    """
    total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class FinetuneTrainer(Trainer):
    """A `Trainer` whose optimizer is `MasterAdamW` with groups by depth, whose data come in an `EpochOrder`, and whose
    checkpoints appear whole or not.

    Args:
        layer_decay: see `Unfreezing.layer_decay`; 1 gives every layer the same learning rate.
        min_lr_ratio: the cosine schedule ends at this share of the learning rate.
    """

    def __init__(self, *args: Any, layer_decay: float = 1.0, min_lr_ratio: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_decay = layer_decay
        self.min_lr_ratio = min_lr_ratio
        self.causal = isinstance(unwrapped(self.model), DeepseekV3ForCausalLM)
        self.labels_per_row = 1.0
        if self.causal and self.eval_dataset:
            labels = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in self.eval_dataset)
            self.labels_per_row = labels / len(self.eval_dataset)

    order: EpochOrder
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model,
                self.args.learning_rate,
                self.args.weight_decay,
                self.layer_decay,
            )
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MasterAdamW(groups, lr=self.args.learning_rate, betas=betas)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            schedule = warmup_cosine(warmup, num_training_steps, self.min_lr_ratio)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        if self.causal:  # in evaluation too: of a whole batch they are the largest tensor by far
            inputs = {**inputs, "skip_logits": True}
        if not model.training:
            inputs, num_items_in_batch = self._for_evaluation(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _for_evaluation(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Inputs and divisor with which `Trainer`'s mean over rows is the mean over all labels of the validation rows,
        whatever the batches: those that repeat rows, to be as large as those of the other ranks, lose these labels."""
        labels, state = inputs["labels"].clone(), self.accelerator.gradient_state
        rows = len(labels)
        if state.end_of_dataloader and state.remainder > 0:
            rows = min(max(state.remainder - self.args.process_index * rows, 0), rows)
        labels[rows:] = IGNORE_INDEX
        return {**inputs, "labels": labels}, max(rows, 1) * self.labels_per_row * self.args.world_size

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        data = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = [len(row["input_ids"]) for row in data] if grouped else None
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.order = EpochOrder(len(data), self.args.seed, rows, lengths)
        return self.order

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        begun = super()._init_training_state(*args)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # what was saved is the path that it had then
            self.state.best_model_checkpoint = str(best)
        return begun

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self._is_over():
            self.control.should_training_stop = True
            return
        self.order.epoch = epoch  # accelerate's own way does not reach the sampler of a resumed loader of many ranks
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _is_over(self) -> bool:
        """Whether the state after the last step was resumed, be it the recipe's last one or that of early stopping."""
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        return stopped_early or self.state.global_step >= self.state.max_steps

    def _get_learning_rate(self) -> float:
        """The one to log: of the group nearest to the output. `AdaptiveLearningRate` is unknown to the scheduler."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0]["lr"])

    def _clip_grad_norm(self, model) -> Any:
        norm = super()._clip_grad_norm(model)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AdaptiveLearningRate):
                callback.grad_norm = float(norm)
        return norm

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / FINISHED).touch()


FINISHED = "finished"


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint under `output` that was written to its end."""
    found = [path.parent for path in output.glob(f"checkpoint-*/{FINISHED}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_unfinished(output: Path) -> None:
    """Remove the checkpoints under `output` that were not written to their end: beside one of a later step `Trainer`
    may take a new checkpoint for an old one, and delete it."""
    for folder in output.glob("checkpoint-*"):
        if not (folder / FINISHED).exists():
            shutil.rmtree(folder)
