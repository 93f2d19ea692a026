"""The training loop: accumulation, clipping, schedule, routing bias, one call of `on_step` per optimizer step."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from ..data import IGNORE_INDEX, PackedDataset, iterate_batches
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..optimizer import MasterAdamW
from .balance import RoutingBiasHook
from .optimizer import learning_rate
from .recipe import Recipe


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Losses in nats per token, over all ranks and micro-batches.

    `counts` `[L, E]` are the expert loads the routing bias was updated from.
    """

    step: int
    loss: float
    ce_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    counts: torch.Tensor


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the step was not taken, weights are as before it."""


def fit(
    model: DeepseekV3ForCausalLM,
    optimizer: MasterAdamW,
    dataset: PackedDataset,
    recipe: Recipe,
    accelerator: Accelerator,
    on_step: Callable[[StepResult], bool],
    start_step: int = 0,
) -> int:
    """Train from `start_step` to `recipe.steps`; returns the number of finished steps.

    The data of a step depend on `recipe.seed` and its number alone. `on_step` returns True to stop after that step.
    With `mtp_loss_coef` 0 the MTP layers rest, weight decay included.

    Raises:
        NonFiniteError: names the step.
    """
    if not model.config.mtp_loss_coef:  # data-parallel wrappers would wait for the gradients they never get
        for layer in model.mtp_layers:
            layer.requires_grad_(False)
    hook = RoutingBiasHook(model)
    handle = optimizer.register_step_pre_hook(hook)
    wrapped = accelerator.prepare(model) if accelerator.num_processes > 1 else model
    if wrapped is model and (recipe.micro_batch_size or recipe.batch_size) < recipe.batch_size:
        for parameter in model.parameters():  # bf16 loses what many micro-batches add; DDP takes no other dtype
            parameter.grad_dtype = torch.float32
    model.train()
    batches = iterate_batches(
        dataset,
        recipe.batch_size,
        seed=recipe.seed,
        start_step=start_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    try:
        for step in range(start_step, recipe.steps):
            rate = learning_rate(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            resting = step >= recipe.bias_update_until * recipe.steps
            hook.speed = 0.0 if resting else model.config.bias_update_speed
            seed_step(recipe.seed, step, accelerator.process_index)
            batch = model_inputs(next(batches), recipe.document_mask, accelerator.device)
            losses = _accumulate(wrapped, batch, recipe, accelerator)
            norm = _clip(model, recipe.grad_clip)
            if not math.isfinite(norm) or not math.isfinite(losses["loss"]):
                raise NonFiniteError(
                    f"step {step}: loss {losses['loss']}, gradient norm {norm}; the step was not taken"
                )
            optimizer.step()
            optimizer.zero_grad()
            tokens = recipe.batch_size * dataset.sequence_length
            if on_step(
                StepResult(step, **losses, grad_norm=norm, learning_rate=rate, tokens=tokens, counts=hook.counts)
            ):
                return step + 1
        return recipe.steps
    finally:
        handle.remove()
        accelerator.free_memory()  # it would keep the wrapper, and with it the model


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout draws from these three alone, so that a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def model_inputs(batch: dict[str, torch.Tensor], document_mask: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """A packed batch for the model: with position ids, which restart per document, documents do not see each other."""
    return {key: value.to(device) for key, value in batch.items() if document_mask or key != "position_ids"}


def _accumulate(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """Backward over the micro-batches of one step; every predicted token of the step weighs the same."""
    predicted = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    if dist.is_initialized():
        dist.all_reduce(predicted)
    # data-parallel wrappers average gradients over ranks; dividing by the mean count makes that the global mean
    share = predicted / accelerator.num_processes
    names = ("loss", "ce_loss", "mtp_loss", "balance_loss")
    totals = torch.zeros(len(names), dtype=torch.float64, device=predicted.device)
    parts = list(_micro_batches(batch, recipe.micro_batch_size or recipe.batch_size))
    for index, part in enumerate(parts):
        with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(model):
            output = model(**part, num_items_in_batch=share, use_cache=False)
            output.loss.backward()
        totals += torch.stack(
            [torch.zeros_like(share) if output.get(n) is None else output[n].detach() for n in names]
        )
    if dist.is_initialized():
        dist.all_reduce(totals)
    return dict(zip(names, (totals / accelerator.num_processes).tolist(), strict=True))


def _clip(model: torch.nn.Module, largest: float) -> float:
    """Scale the gradients to an L2 norm of at most `largest`; returns the norm before, summed in fp32."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return float(norm)


def _micro_batches(batch: dict[str, torch.Tensor], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(batch["labels"]), rows):
        yield {key: value[start : start + rows] for key, value in batch.items()}
