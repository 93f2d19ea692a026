"""LoRA (arXiv 2106.09685) on every part of the architecture, through PEFT: which tensors, and how many.

An adapter is an ordinary PEFT adapter: `PeftModel.from_pretrained` loads it on this model and on stock transformers'
without this package. What is ours is the choice of targets, which PEFT cannot express for this architecture (it reads
`gate_proj` and its like as the routed experts, wherever they stand), and how adapters of the experts are computed
(`lora_layers`).

Fine-tuning leaves the routing bias as it is: only the pretraining loop's `RoutingBiasHook` ever changes it.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..configuration import DeepseekV3Config
from .lora_layers import quantized_weights, quantized_weights_as_parameters, register_layers

_SWIGLU = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
# Target set -> names within a decoder layer: modules for the attention, parameters for the others.
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": tuple(
        f"self_attn.{name}"
        for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    ),
    "dense_mlp": tuple(f"mlp.{name}" for name in _SWIGLU),
    "shared_experts": tuple(f"mlp.shared_experts.{name}" for name in _SWIGLU),
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "router": ("mlp.gate.weight",),
}
ALL = ("attention", "dense_mlp", "shared_experts", "experts")
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def target_names(
    config: DeepseekV3Config,
    targets: Collection[str] = ("attention",),
    layers: Iterable[int] | None = None,
    mtp: bool = False,
) -> dict[str, list[str]]:
    """Target set -> full names of what it stands for in the model, `model.layers.3.mlp.experts.down_proj`.

    `"all"` is every set but the router, as far as the layers have them.

    Raises:
        ValueError: an unknown set or layer, or a named set that none of the layers has.
    """
    if isinstance(targets, str):
        raise ValueError(f"targets: found the string {targets!r}, allowed is a list of {', '.join([*TARGETS, 'all'])}")
    if unknown := [name for name in targets if name not in (*TARGETS, "all")]:
        raise ValueError(f"targets: found {', '.join(unknown)}, allowed are {', '.join([*TARGETS, 'all'])}")
    numbers = list(_layers(config, layers, mtp))
    found: dict[str, list[str]] = {}
    for target, suffixes in TARGETS.items():
        if target not in targets and not ("all" in targets and target in ALL):
            continue
        names = [f"model.layers.{n}.{suffix}" for n in numbers for suffix in suffixes if _has(config, n, suffix)]
        if names:
            found[target] = names
        elif target in targets:
            raise ValueError(f"targets: found {target!r}, which none of the layers {numbers} has")
    if not found:
        raise ValueError(f"targets: found {list(targets)}, allowed is at least one of {', '.join([*TARGETS, 'all'])}")
    return found


def _layers(config: DeepseekV3Config, layers: Iterable[int] | None, mtp: bool) -> Iterator[int]:
    main, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    chosen = range(main) if layers is None else sorted(set(layers))
    if unknown := [number for number in chosen if not 0 <= number < main]:
        raise ValueError(f"layers: found {unknown}, allowed are the main layers 0 to {main - 1}")
    yield from chosen
    if mtp and not depths:
        raise ValueError("mtp: found True for a model with num_nextn_predict_layers=0, allowed is False")
    if mtp:
        yield from range(main, main + depths)


def _has(config: DeepseekV3Config, layer: int, suffix: str) -> bool:
    if suffix.startswith("self_attn.q_"):
        return (suffix == "self_attn.q_proj") == (config.q_lora_rank is None)
    dense = layer < config.first_k_dense_replace
    return suffix.startswith("self_attn.") or (suffix in TARGETS["dense_mlp"]) == dense


def lora_config(
    config: DeepseekV3Config,
    targets: Collection[str] = ("attention",),
    rank: int | Mapping[str, int] = 16,
    alpha: float | Mapping[str, float] | None = None,
    layers: Iterable[int] | None = None,
    mtp: bool = False,
    task_type: str | None = "CAUSAL_LM",
) -> LoraConfig:
    """PEFT's configuration of an adapter for these targets, for `get_peft_model` and `add_adapter`.

    A base with quantized weights needs `apply_lora` or `load_adapter`: PEFT alone does not find them.
    Dropout is no part of it: PEFT refuses files that name one for a parameter. It belongs to the training, see
    `set_dropout`.

    Args:
        targets: names of `TARGETS`, or `"all"` for every set but the router.
        rank: of every adapter, or one per target set.
        alpha: the update is scaled by `alpha / rank`; by default 2 for every set. One number goes with one rank.
        layers: main layers by number, all by default.
        mtp: adapt the MTP layers too, as the decoder layers that they are; their `eh_proj` stays frozen.
        task_type: PEFT's name of the task: CAUSAL_LM, SEQ_CLS, TOKEN_CLS; the latter two also train `score`.

    Raises:
        ValueError: as `target_names`, and for a rank or alpha that does not fit the targets.
    """
    layers = None if layers is None else list(layers)
    if task_type not in (None, *TASK_TYPES.values()):
        raise ValueError(f"task_type: found {task_type!r}, allowed are {', '.join(TASK_TYPES.values())}")
    if mtp and task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"mtp: found True with task_type={task_type!r}, whose models have no MTP layers")
    names = target_names(config, targets, layers, mtp)
    ranks = _per_target("rank", rank, names)
    if isinstance(alpha, int | float) and len(set(ranks.values())) > 1:
        raise ValueError(f"alpha: found {alpha} with several ranks, allowed are None or one for each target set")
    alphas = _per_target("alpha", {t: 2 * r for t, r in ranks.items()} if alpha is None else alpha, names)
    first, *others = names
    # PEFT's own test of layers for modules; parameters are named in full, as it has none for them. The names of
    # modules are kept short because it would shorten a list of 20 itself.
    attention = sorted({name.rpartition(".")[2] for name in names.get("attention", ())})
    selected = {"layers_to_transform": list(_layers(config, layers, mtp)), "layers_pattern": "layers"}
    return register_layers(
        LoraConfig(
            task_type=task_type,
            r=ranks[first],
            lora_alpha=alphas[first],
            rank_pattern={_pattern(t): ranks[t] for t in others if ranks[t] != ranks[first]},
            alpha_pattern={_pattern(t): alphas[t] for t in others if alphas[t] != alphas[first]},
            target_modules=attention,
            target_parameters=[name for target, found in names.items() if target != "attention" for name in found],
            **(selected if attention else {}),
        )
    )


def _per_target(argument: str, value: Any, names: Mapping[str, list[str]]) -> dict[str, Any]:
    values = dict(value) if isinstance(value, Mapping) else dict.fromkeys(names, value)
    if values.keys() != names.keys():
        raise ValueError(f"{argument}: found values for {', '.join(values)}; allowed are those of {', '.join(names)}")
    if wrong := [number for number in values.values() if not number > 0]:
        raise ValueError(f"{argument}: found {wrong}, allowed are numbers above 0")
    return values


def _pattern(target: str) -> str:
    """A regular expression of the names of a set, as PEFT's patterns of ranks want it."""
    return rf"layers\.\d+\.({'|'.join(re.escape(suffix) for suffix in TARGETS[target])})"


def apply_lora(
    model: PreTrainedModel,
    targets: Collection[str] = ("attention",),
    rank: int | Mapping[str, int] = 16,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    layers: Iterable[int] | None = None,
    mtp: bool = False,
    task_type: str | None = None,
) -> PeftModel:
    """Freeze `model` and add a new adapter, named "default", in place; the arguments are those of `lora_config`.

    Trainable afterwards are the factors of the targets, in fp32 for bf16 weights, and a classification head's `score`.
    `dropout` acts on the input of every A while training. `task_type` follows from the model's class if it is None.
    The base may be quantized (`quantization`).

    Raises:
        ValueError: as `lora_config`; and if the model lacks what the configuration says, so that a target would stay
            frozen.
    """
    by_class = (task for name, task in TASK_TYPES.items() if type(model).__name__.endswith(name))
    task_type = task_type or next(by_class, None)
    layers = None if layers is None else list(layers)
    if next(adapted(model), None):
        raise ValueError("model: found one with adapters, allowed is one without: load_adapter adds to it")
    config = lora_config(model.config, targets, rank, alpha, layers, mtp, task_type)
    names = target_names(model.config, targets, layers, mtp)
    _check_dropout(dropout, names)
    with injecting(model):
        peft_model = get_peft_model(model, config)
    _check_trainable(peft_model, names)
    set_dropout(peft_model, dropout)
    return peft_model


@contextmanager
def injecting(model: nn.Module) -> Iterator[None]:
    with quantized_weights_as_parameters(model), warnings.catch_warnings():
        # PEFT looks for them among the names of modules only, and warns of all that stand for parameters.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Let every adapter of `model` drop elements of its input with this probability while it trains.

    Raises:
        ValueError: not in [0, 1), or above 0 with an adapter of a router, whose input is not the adapter's.
    """
    layers = dict(adapted(model))
    _check_dropout(dropout, {target_of(name) for name in layers})
    for layer in layers.values():
        for adapter in layer.lora_dropout:
            layer.lora_dropout[adapter] = nn.Dropout(dropout) if dropout else nn.Identity()
        layer.train(layer.training)


def _check_dropout(dropout: float, targets: Collection[str]) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: found {dropout}, allowed is 0 <= dropout < 1")
    if dropout and "router" in targets:
        raise ValueError(f"dropout: found {dropout} with target 'router', allowed is 0")


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Full name in the base model, `model.layers.3.mlp.experts.down_proj`, and PEFT's layer of all that is adapted."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name, layer


def target_of(name: str) -> str:
    """The target set of a full name, of a module or of its weight; "head" for `score`, "other" for the rest."""
    if re.search(r"(^|\.)score\b", name):
        return "head"
    pattern = "(.*\\.)?{}(\\.weight)?"
    return next((target for target in TARGETS if re.fullmatch(pattern.format(_pattern(target)), name)), "other")


def _check_trainable(model: PeftModel, names: Mapping[str, list[str]]) -> None:
    layers = dict(adapted(model))
    for target, expected in names.items():
        if missing := [name for name in expected if name not in layers]:
            raise ValueError(f"targets: found {target!r}, but LoRA does not fit {', '.join(missing[:4])}")
    assert layers.keys() == {name for expected in names.values() for name in expected}
    wanted = set(_adapter_parameters(model, model.active_adapters))
    assert wanted == {parameter for parameter in model.parameters() if parameter.requires_grad}


def _adapter_parameters(model: nn.Module, adapters: Collection[str] | None = None) -> dict[nn.Parameter, str]:
    """Parameter -> target set ("head": of a module that is trained as a whole) of these adapters, or of all."""
    found: dict[nn.Parameter, str] = {}

    def add(modules: nn.ModuleDict, target: str) -> None:
        for adapter, module in modules.items():
            if adapters is None or adapter in adapters:
                found.update(dict.fromkeys(module.parameters(), target))

    for name, layer in adapted(model):
        add(layer.lora_A, target_of(name))
        add(layer.lora_B, target_of(name))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            add(module.modules_to_save, "head")
    return found


def report_trainable(model: nn.Module) -> dict[str, Any]:
    """What trains: tensors and parameters by target set, and how much of the model that is.

    -> `targets`: {set: {`tensors`, `parameters`}} with "head" for a classification head and "other" for what is in no
    set; `trainable` and `parameters`, numbers of parameters (a quantized weight counts as what it stands for); `share`
    of the first in the second; `adapter_bytes` in memory; `quantized_byte_fraction`, the share of the base's bytes
    that are those of quantized weights, scales left out for bitsandbytes' layers. Works without adapters too.
    """
    adapter = _adapter_parameters(model)
    targets: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            target = adapter.get(parameter) or target_of(name)
            row = targets.setdefault(target, {"tensors": 0, "parameters": 0})
            row["tensors"] += 1
            row["parameters"] += parameter.numel()
    base = list(_base_weights(model, adapter))
    trainable = sum(row["parameters"] for row in targets.values())
    parameters = sum(parameter.numel() for parameter in adapter) + sum(count for count, _, _ in base)
    return {
        "targets": targets,
        "trainable": trainable,
        "parameters": parameters,
        "share": trainable / parameters,
        "adapter_bytes": sum(parameter.nbytes for parameter in adapter),
        "quantized_byte_fraction": sum(size for _, size, quantized in base if quantized)
        / sum(size for _, size, _ in base),
    }


def _base_weights(model: nn.Module, adapter: Collection[nn.Parameter]) -> Iterator[tuple[int, int, bool]]:
    """(elements, bytes, whether quantized) of each weight of the base."""
    parts: set[nn.Parameter] = set()
    for _, _, weight in quantized_weights(model):
        parts.update(weight.parameters())
        yield weight.shape.numel(), sum(part.nbytes for part in weight.parameters()), True
    for parameter in model.parameters():
        if parameter in adapter or parameter in parts:
            continue
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes' Params4bit
        yield parameter.numel() if state is None else state.shape.numel(), parameter.nbytes, state is not None


def trainable_table(report: Mapping[str, Any]) -> str:
    """`report_trainable`'s result to print."""
    rows = [("target", "tensors", "parameters")]
    rows += [(target, str(row["tensors"]), f"{row['parameters']:,}") for target, row in report["targets"].items()]
    rows.append(("total", str(sum(row["tensors"] for row in report["targets"].values())), f"{report['trainable']:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])]) for row in rows]
    lines.append(
        f"{report['share']:.3%} of {report['parameters']:,} parameters; adapter {report['adapter_bytes'] / 2**20:.1f} "
        f"MiB; {report['quantized_byte_fraction']:.1%} of the base's bytes are quantized"
    )
    return "\n".join(lines)
