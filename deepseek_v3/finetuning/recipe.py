"""What a fine-tuning run is: one strict, flat recipe, read from YAML."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..recipe import YamlRecipe, as_number
from .lora import TARGETS
from .unfreezing import PRESETS, Unfreezing

# What `load_task` takes from other fields of the recipe.
NO_OPTIONS = ("name_or_path", "path", "limit", "text_answers")


@dataclass(frozen=True)
class FinetuneRecipe(YamlRecipe):
    """A fine-tuning run.

    Attributes:
        base: the model to adapt, a folder or a Hub repository.
        task: a task by name (`deepseek_v3.finetuning.tasks`), or files, a folder or `datasets:NAME` with the columns
            messages, prompt and completion, text and label, or text.
        data: where a task by name reads its files; None takes its default.
        task_options: options of the task as `load_task` takes them, `seed` among them: runs of several seeds share
            their splits.
        output_dir: where everything goes.
        limit: at most this many rows of each split; None takes all.
        method: `lora`; `full` (all weights but the routers'); `head` (only a classification head: the frozen base).
        targets: of LoRA: attention, dense_mlp, shared_experts, experts, router, all.
        rank, alpha, dropout: of LoRA; alpha None is twice the rank.
        layers: the main layers that get LoRA; None is all.
        quantize: `nf4` holds the frozen base in 4 bits (QLoRA).
        unfreezing: fields of `Unfreezing` for progressive unfreezing; None trains everything from the start.
        preset: learning rate and batch size of a common case (`unfreezing.PRESETS`), where the recipe names none.
        learning_rate, batch_size: None takes the preset's; without a preset 2e-4 and 16 (full: 2e-5).
        micro_batch_size: rows per forward and backward pass of one rank; None takes a rank's whole share.
        epochs, max_steps: of training; max_steps None follows from the epochs.
        max_length: tokens per row. Conversations and documents are packed into rows, without attention across them.
        warmup_ratio, min_lr_ratio, weight_decay, grad_clip: AdamW and its cosine schedule.
        adaptive_lr: halve the learning rate after an evaluation without progress, damp steps with outlying gradients.
        mtp: `trained` keeps the MTP loss for the base's MTP layers; `frozen` leaves them and their loss out.
        evaluations_per_epoch: on the validation split; the best state is kept.
        validation_rows: at most this many validation rows, drawn at random, are looked at while training.
        patience: stop after this many evaluations without progress; None trains to the end.
        generate: how many test prompts of a chat task are answered for ROUGE-L; its conversations must end with text.
        general_text: what forgetting is measured on, a corpus as in `deepseek_v3.data.load_corpus`; None skips it.
        compare: also fit the classical baselines of a classification task: majority class, TF-IDF, a table's own.
        gradient_checkpointing: recompute activations in backward.
        dtype: of the base's weights; `auto` as the checkpoint, `bf16`, `fp32`. What trains is updated in fp32.
        merge: also write the merged model; set after the run is finished, from its adapter.
        report_to: trackers, as in `TrainingArguments.report_to`.
        seed: of the adapters, the head and the data order.
    """

    base: str
    task: str
    output_dir: str
    data: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    method: Literal["lora", "full", "head"] = "lora"
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    layers: list[int] | None = None
    quantize: Literal["none", "nf4"] = "none"
    unfreezing: dict[str, Any] | None = None
    preset: str | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    max_length: int = 512
    warmup_ratio: float = 0.05
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    adaptive_lr: bool = False
    mtp: Literal["frozen", "trained"] = "frozen"
    evaluations_per_epoch: int = 1
    validation_rows: int | None = None
    patience: int | None = None
    generate: int = 0
    general_text: str | None = None
    compare: bool = True
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    merge: bool = True
    report_to: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("limit", "rank", "batch_size", "micro_batch_size", "max_steps", "patience", "validation_rows")
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(at_least_one, (1, 1e12))
        ranges |= dict.fromkeys(("warmup_ratio", "min_lr_ratio"), (0.0, 1.0))
        ranges |= {"alpha": (1, 1e6), "dropout": (0.0, 0.99)}
        ranges |= {"learning_rate": (1e-12, 10.0), "weight_decay": (0.0, 10.0)}
        ranges |= {"epochs": (1e-6, 1e6), "max_length": (2, 2**24), "grad_clip": (1e-6, 1e6), "generate": (0, 1e9)}
        ranges["evaluations_per_epoch"] = (1, 1000)
        ranges["seed"] = (0, 2**32 - 1)
        self.check(ranges)
        targets = (*TARGETS, "all")
        if not self.targets or not set(self.targets) <= set(targets):
            raise ValueError(f"recipe: targets is {self.targets!r}, allowed are some of {', '.join(targets)}")
        if named := [name for name in self.task_options if name in NO_OPTIONS]:
            fields = "task, data, limit and generate"
            raise ValueError(f"recipe: task_options has {', '.join(named)}: use the fields {fields}")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"recipe: preset is {self.preset!r}, allowed are {', '.join(PRESETS)}")
        if self.quantize == "nf4" and self.method != "lora":
            problem = "but on 4-bit weights only adapters train: use lora"
            raise ValueError(f"recipe: quantize is 'nf4' with method {self.method!r}, {problem}")
        if self.unfreezing is not None:
            if self.method == "head":
                raise ValueError("recipe: unfreezing with method 'head', which trains no layer: use full or lora")
            self.schedule()

    def schedule(self) -> Unfreezing | None:
        """The stages of progressive unfreezing. ValueError for a field that `Unfreezing` lacks or refuses."""
        if self.unfreezing is None:
            return None
        known = [spec.name for spec in fields(Unfreezing)]
        if unknown := [str(name) for name in self.unfreezing if name not in known]:
            raise ValueError(f"recipe: unfreezing has {', '.join(unknown)}; allowed are {', '.join(known)}")
        try:
            types = {spec.name: spec.type for spec in fields(Unfreezing)}
            return Unfreezing(**{name: as_number(types[name], value) for name, value in self.unfreezing.items()})
        except ValueError as error:
            raise ValueError(f"recipe: {error}") from None

    def peak_learning_rate(self) -> float:
        default = 2e-5 if self.method == "full" else 2e-4
        return self.learning_rate or float(PRESETS.get(self.preset or "", {}).get("learning_rate", default))

    def rows_per_step(self) -> int:
        return self.batch_size or int(PRESETS.get(self.preset or "", {}).get("batch_size", 16))
