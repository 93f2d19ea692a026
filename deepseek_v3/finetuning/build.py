"""The model of a recipe: the base, loaded for the task, with what shall train on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import tokenization
from ..configuration import DeepseekV3Config
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from ..modeling_deepseek_v3.weight_files import scan_folder
from ..quantization import nf4_config, packed_config
from ..tokenization import check_vocab
from .lora import apply_lora
from .recipe import FinetuneRecipe
from .tasks import TaskData

HEAD = "score."
ROUTER = ".mlp.gate."


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """`tokenization.load_tokenizer` of a recipe's base; ValueError naming `base` if it has none."""
    try:
        return tokenization.load_tokenizer(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"base {base}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None


def build_model(
    recipe: FinetuneRecipe, task: TaskData, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> nn.Module:
    """The base with the task's head and the recipe's adapters; what requires a gradient is what may train.

    The routing bias never moves in fine-tuning: only pretraining's optimizer hook updates it. A base that is a
    classifier of the task's own classes keeps its head.

    Raises:
        ValueError: a base that does not fit: a tokenizer with more tokens, a classifier of other classes.
    """
    config = DeepseekV3Config.from_pretrained(recipe.base)
    check_vocab(tokenizer, config.vocab_size)
    options: dict[str, Any] = {"dtype": {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}[recipe.dtype]}
    if recipe.quantize == "nf4":
        options |= {"quantization_config": nf4_config(), "device_map": {"": device}}
    elif recipe.method == "full" and getattr(config, "quantization_config", None) is not None:
        options["quantization_config"] = packed_config(dequantize=True)  # packed weights do not train
    cls: type[DeepseekV3ForCausalLM] | type[DeepseekV3ForSequenceClassification] = DeepseekV3ForCausalLM
    if task.kind == "classification":
        assert task.labels is not None
        _check_classes(recipe.base, config, task.labels)
        cls = DeepseekV3ForSequenceClassification
        config.pad_token_id = tokenizer.pad_token_id  # not of a language model: its embedding would not train
        config.num_labels = len(task.labels)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: number for number, name in enumerate(task.labels)}
    elif recipe.method == "head":
        raise ValueError(f"recipe: method is 'head', but {task.name} is a {task.kind} task; allowed are lora, full")
    config.seq_balance_coef = 0.0  # the routers rest
    if recipe.mtp == "frozen":
        config.mtp_loss_coef = 0.0
    torch.manual_seed(recipe.seed)  # of a new head
    model = cls.from_pretrained(recipe.base, config=config, **options)
    if recipe.quantize == "none":
        model.to(device)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.method == "lora":
        return apply_lora(
            model,
            targets=tuple(recipe.targets),
            rank=recipe.rank,
            alpha=recipe.alpha,
            dropout=recipe.dropout,
            layers=recipe.layers,
            mtp=recipe.mtp == "trained" and task.kind != "classification",
            task_type="SEQ_CLS" if task.kind == "classification" else "CAUSAL_LM",
        )
    depths = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    mtp_layers = tuple(f"layers.{i}." for i in depths)
    for name, parameter in model.named_parameters():
        if recipe.method == "head":
            parameter.requires_grad_(name.startswith(HEAD))
        else:
            frozen = ROUTER in name or (recipe.mtp == "frozen" and any(layer in name for layer in mtp_layers))
            parameter.requires_grad_(not frozen)
    return model


def _check_classes(base: str, config: DeepseekV3Config, labels: Sequence[str]) -> None:
    if not any("Classification" in name for name in config.architectures or ()):
        return  # a language model: the head is a new one
    found = [config.id2label[number] for number in sorted(config.id2label)]
    if found != list(labels):
        problem = f"a classifier of {', '.join(found)}; the task's classes are {', '.join(labels)}"
        raise ValueError(f"base {base}: {problem}; allowed is a language model, or a classifier of these classes")


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_folder(base: str | Path) -> Path:
    """Where a base that was loaded lies: the folder itself, or what of a repository on the Hub is on this machine."""
    return Path(base) if Path(base).is_dir() else Path(snapshot_download(str(base), local_files_only=True))


def as_language_model(model: nn.Module, base: str | Path) -> DeepseekV3ForCausalLM:
    """`model` itself, or a classifier's trunk (shared, adapters included) under the base's language-model head.

    It is how forgetting is measured: the same weights answer for the task and for general text. ValueError naming
    `base` if that is a classifier itself, without such a head.
    """
    inner = unwrapped(model)
    if isinstance(inner, DeepseekV3ForCausalLM):
        return inner
    with torch.device("meta"):
        language = DeepseekV3ForCausalLM(_without_mtp(DeepseekV3Config.from_pretrained(base)))
    language.model = inner.model
    if language.config.tie_word_embeddings:
        language.lm_head.weight = inner.model.embed_tokens.weight
    else:
        stored = scan_folder(base_folder(base))
        if "lm_head.weight" not in stored:
            problem = "found no lm_head.weight (a classifier), so forgetting cannot be measured"
            raise ValueError(f"base {base}: {problem}; allowed is general_text: null")
        with safe_open(stored["lm_head.weight"].file, "pt") as weights:
            head = weights.get_tensor("lm_head.weight").to(inner.device, inner.dtype)
        language.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return language


def _without_mtp(config: DeepseekV3Config) -> DeepseekV3Config:
    config.num_nextn_predict_layers = 0
    return config
