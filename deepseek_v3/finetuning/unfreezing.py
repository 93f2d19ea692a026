"""Progressive unfreezing: training starts with the last layers and reaches further down stage by stage.

Gradual unfreezing and discriminative learning rates are from ULMFiT (arXiv 1801.06146, 3.2 and 3.3). All parameters
sit in one optimizer from the start. A frozen one gets no gradient, so it has no optimizer state and does not move;
when a stage thaws it, the state of what already trains goes on as it was.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..process import say

# Learning rate and batch size of the field's three common cases.
PRESETS: dict[str, dict[str, float | int]] = {
    "domain-adaptation": {"learning_rate": 1e-5, "batch_size": 32},
    "task-transfer": {"learning_rate": 3e-6, "batch_size": 16},
    "few-shot": {"learning_rate": 1e-6, "batch_size": 8},
}


@dataclass(frozen=True)
class Unfreezing:
    """A schedule of stages.

    Attributes:
        first_layers: stage 0 trains the head, the final norm, MTP layers and this many of the last main layers.
        layers_per_stage: how many more each later stage adds; the token embedding, and with it a tied head, comes with
            the lowest layer.
        advance: what ends a stage. `plateau`: evaluations without a lower validation loss.
        every: how many of these make a stage.
        layer_decay: a layer's learning rate is the recipe's times `layer_decay` to the number of main layers above it.
        stages: their number; None takes as many as it needs to reach the embedding.
    """

    first_layers: int = 3
    layers_per_stage: int = 3
    advance: Literal["steps", "epochs", "plateau"] = "epochs"
    every: int = 1
    layer_decay: float = 0.9
    stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("first_layers", "layers_per_stage", "every", "stages"):
            value = getattr(self, name)
            if (value is not None or name != "stages") and (type(value) is not int or value < 1):
                raise ValueError(f"unfreezing: {name} is {value!r}, allowed are whole numbers from 1")
        if self.advance not in ("steps", "epochs", "plateau"):
            raise ValueError(f"unfreezing: advance is {self.advance!r}, allowed are steps, epochs, plateau")
        if not isinstance(self.layer_decay, float | int) or not 0 < self.layer_decay <= 1:
            raise ValueError(f"unfreezing: layer_decay is {self.layer_decay!r}, allowed are numbers in (0, 1]")


def layers_above(name: str, num_hidden_layers: int) -> int:
    """How many main layers lie above the parameter `name`: 0 for the last one, the head, the final norm and MTP
    layers, `num_hidden_layers` for the token embedding."""
    if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
        return max(0, num_hidden_layers - 1 - int(match[1]))
    return num_hidden_layers if "embed_tokens." in name else 0


def stage_of(name: str, num_hidden_layers: int, schedule: Unfreezing) -> int:
    """The stage from which on the parameter `name` trains."""
    above = min(layers_above(name, num_hidden_layers), num_hidden_layers - 1)  # the embedding with the lowest layer
    return max(0, -(-(above + 1 - schedule.first_layers) // schedule.layers_per_stage))


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups of everything that requires a gradient, by learning rate and weight decay (matrices only)."""
    layers = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (layers_above(name, layers) if layer_decay < 1 else 0, parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**above,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (above, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


class ProgressiveUnfreezing(TrainerCallback, ExportableState):
    """Holds each parameter's `requires_grad` to the stage of a `Trainer`'s run; its state is saved with the run's.

    What may train at all is what requires a gradient when training starts. Set `ddp_find_unused_parameters=True`:
    DistributedDataParallel then registers all of it, and a frozen layer is one that had no part in a step. Of the
    stages, `steps` and `epochs` are functions of where the run is; a `plateau` is remembered, for which
    `restore_callback_states_from_checkpoint` has to be on.
    """

    def __init__(self, schedule: Unfreezing | dict[str, Any]) -> None:
        self.schedule = Unfreezing(**schedule) if isinstance(schedule, dict) else schedule  # a dict from a saved state
        self.stage = 0
        self.best: float | None = None  # of a plateau
        self.waited = 0
        self.applied: int | None = None
        self.candidates: list[tuple[nn.Parameter, int]] = []

    def state(self) -> dict[str, Any]:
        remembered = {"stage": self.stage, "best": self.best, "waited": self.waited}
        return {"args": {"schedule": asdict(self.schedule)}, "attributes": remembered}

    def on_init_end(self, args, state, control, model, **kwargs):
        self._find(model)  # already now: what is wrong is known before a run begins

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        self._find(model)
        self._move(state)
        if self.schedule.advance == "plateau":
            return
        passed = state.max_steps - 1  # when the last step begins
        if self.schedule.advance == "epochs":
            passed //= max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        reached, stages = passed // self.schedule.every + 1, self._last() + 1
        if reached < stages:
            say(f"unfreezing: {reached} of {stages} stages are reached in {state.max_steps} steps")

    def on_step_begin(self, args, state, control, **kwargs):
        self._move(state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.schedule.advance != "plateau":
            return
        if "eval_loss" not in metrics:
            raise ValueError(f"unfreezing: advance is 'plateau' and needs eval_loss; found {', '.join(metrics)}")
        loss = metrics["eval_loss"]
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited == self.schedule.every:  # the new layers get as long, measured from here
            self.stage, self.best, self.waited = self.stage + 1, loss, 0

    def on_train_end(self, args, state, control, **kwargs):
        for parameter, _ in self.candidates:
            parameter.requires_grad_(True)

    def _find(self, model: nn.Module) -> None:
        layers, first = model.config.num_hidden_layers, self.schedule.first_layers
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.candidates = [(p, stage_of(name, layers, self.schedule)) for name, p in trained]
        if trained and all(stage > 0 for _, stage in self.candidates):
            least = min(1 + min(layers_above(name, layers) for name, _ in trained), layers)
            problem = f"unfreezing.first_layers is {first}, with which nothing trains in the first stage"
            raise ValueError(f"{problem}; allowed are whole numbers from {least}")

    def _move(self, state) -> None:
        if self.schedule.advance == "steps":
            self.stage = state.global_step // self.schedule.every
        elif self.schedule.advance == "epochs":
            self.stage = int(state.epoch or 0) // self.schedule.every
        self.stage = min(self.stage, self._last())
        if self.stage != self.applied:
            self.applied = self.stage
            for parameter, stage in self.candidates:
                parameter.requires_grad_(stage <= self.stage)

    def _last(self) -> int:
        last = max((stage for _, stage in self.candidates), default=0)
        return last if self.schedule.stages is None else min(last, self.schedule.stages - 1)
