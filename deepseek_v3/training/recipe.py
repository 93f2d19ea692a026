"""What a pretraining run is: one strict, flat recipe, read from YAML."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..configuration import PRESETS, DeepseekV3Config, preset
from ..recipe import YamlRecipe, as_number

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
Dtype = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Recipe(YamlRecipe):
    """A pretraining run. Two runs of one recipe on one machine give the same losses.

    Attributes:
        output_dir: where everything goes.
        data: corpus, as in `deepseek_v3.data.load_corpus`: `stdlib`, text files, a folder, a .jsonl, `datasets:NAME`.
        heldout: held-out corpus; None splits `data` by a hash of the document names.
        heldout_fraction: share of the documents held out by that split.
        text_field: the column or key with the text.
        tokenizer: folder of a tokenizer with BOS and EOS; None trains a byte-level BPE of the model's vocabulary size
            on the corpus.
        preset: name of the model's preset.
        model: fields of the configuration that differ from the preset's.
        sequence_length: tokens per row.
        document_mask: keep packed documents from attending to each other. False as in the paper's pretraining (4.1).
        batch_size: rows per optimizer step over all ranks.
        micro_batch_size: rows per forward and backward pass of one rank; None takes a rank's whole share.
        steps: optimizer steps.
        learning_rate: peak; linear warm-up, then cosine to `min_lr_ratio` of it.
        warmup_steps, min_lr_ratio, weight_decay, beta1, beta2, grad_clip: AdamW and its schedule (paper 4.2).
        bias_update_until: share of the steps after which the routing bias rests (paper 4.2: 14.3T of 14.8T tokens).
        dtype: of the weights; `bf16` keeps fp32 master weights in the optimizer; `auto` takes the faster
            where the run begins.
        gradient_checkpointing: recompute activations in backward.
        seed: of initialisation and data order.
        log_every, eval_every, save_every: in steps; a save is also made at the end and on Ctrl-C.
        keep_checkpoints: how many of the saved states stay.
        compare: also measure gzip, n-gram and a dense model of equal compute.
    """

    output_dir: str = "outputs/quickstart"
    data: str = "stdlib"
    heldout: str | None = None
    heldout_fraction: float = 0.05
    text_field: str = "text"
    tokenizer: str | None = None
    preset: str = "small"
    model: dict[str, Any] = field(default_factory=dict)
    sequence_length: int = 256
    document_mask: bool = False
    batch_size: int = 8
    micro_batch_size: int | None = None
    steps: int = 1000
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    bias_update_until: float = 0.966
    dtype: Dtype = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    save_every: int = 250
    keep_checkpoints: int = 1
    compare: bool = True

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "steps", "log_every", "eval_every", "save_every", "keep_checkpoints")
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(at_least_one, (1, 1e12))
        ranges |= {"sequence_length": (2, 2**24), "warmup_steps": (0, 1e12), "seed": (0, 2**63 - 1)}
        ranges |= dict.fromkeys(("min_lr_ratio", "bias_update_until"), (0.0, 1.0))
        ranges |= dict.fromkeys(("beta1", "beta2"), (0.0, 0.99999))
        ranges |= {"learning_rate": (0.0, 10.0), "weight_decay": (0.0, 10.0), "grad_clip": (1e-6, 1e6)}
        ranges["heldout_fraction"] = (1e-4, 0.5)
        self.check(ranges)
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                f"recipe: micro_batch_size is {self.micro_batch_size}, allowed are 1 to {self.batch_size}"
            )
        if self.preset not in PRESETS:
            raise ValueError(f"recipe: preset is {self.preset!r}, allowed are {', '.join(PRESETS)}")
        if names := [name for name in self.model if not isinstance(name, str)]:
            raise ValueError(f"recipe: model has the field {names[0]!r}, allowed are names")

    @classmethod
    def load(cls, path: str | Path = QUICKSTART, **overrides: Any) -> "Recipe":
        """As `YamlRecipe.load`, with the fields of the model checked, too."""
        recipe = super().load(path, **overrides)
        types = {spec.name: spec.type for spec in fields(DeepseekV3Config)}
        recipe = replace(recipe, model={name: as_number(types.get(name), v) for name, v in recipe.model.items()})
        try:
            recipe.config()
        except ValueError as error:
            raise ValueError(f"{path}: model: {error}") from None
        return recipe

    def config(self, **special_tokens: int | None) -> DeepseekV3Config:
        """The model's configuration, with the tokenizer's special token ids. ValueError: its fields are not usable."""
        lengths = {"max_position_embeddings": max(self.sequence_length, preset(self.preset).max_position_embeddings)}
        config = preset(self.preset, **(lengths | special_tokens | self.model))
        if config.max_position_embeddings < self.sequence_length:
            raise ValueError(
                f"max_position_embeddings is {config.max_position_embeddings}, allowed are {self.sequence_length} "
                "(sequence_length) and more"
            )
        return config


def kernels(config: DeepseekV3Config) -> dict[str, str | None]:
    """The kernel choices among a configuration's fields, which no file of it holds."""
    names = ("attn_implementation", "experts_implementation")
    return {name: getattr(config, f"_{name}") for name in names}
