"""A PEFT LoRA adapter on disk, merged into one tensor at a time: `W + scaling B A`, which the format rounds.

Only files are read: it takes neither PEFT nor a model. What is understood is plain LoRA on linear layers, on their
weights as parameters and on the fused experts, and modules that were trained as a whole (`modules_to_save`).

Shape legend: E experts, r rank, I width of an expert.
"""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..configuration.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from ..modeling_deepseek_v3.moe import EXPERT_WEIGHTS
from ..modeling_deepseek_v3.weight_files import read_header, read_json
from .stored import PLAIN, Region, Stored, plain, regions

PREFIX = "base_model.model."
CLASSIFIER_HEADS = ("score.weight", "score.bias")
RECORD = "run.json"  # of the run that trained the adapter


class Update(NamedTuple):
    """What is added to one official tensor: `scaling B[rows] A`, for one of `experts` if there are several."""

    a: Region  # [E r, in]
    b: Region  # [out, r E], the expert fastest
    scaling: float
    rows: slice  # of B
    expert: int = 0
    experts: int = 1


def base_folder(adapter: Path) -> Path:
    """The local folder of the base that the adapter's configuration names."""
    base = _config(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
        found = f"base_model_name_or_path is {base!r:.200}"
        raise ValueError(f"{adapter / ADAPTER_CONFIG}: {found}, allowed is a local folder; or pass base and adapter")
    return Path(base)


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"adapter: found {str(folder)!r}, allowed is a folder with {ADAPTER_CONFIG}")
    return read_adapter_config(folder)


class Adapter:
    """An adapter's files, checked against the tensors of its base.

    Attributes:
        folder: of the adapter.
        task_type: PEFT's name of the task, or None.
        whole: official name -> tensor that takes the place of the base's.
        updates: official name -> what is added to it.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            shapes: official name -> shape of the base's tensors.

        Raises:
            ValueError: another variant than plain LoRA, or tensors that do not fit the base; names file and field.
        """
        self.folder = folder
        config = _config(folder)
        self.task_type: str | None = config.get("task_type")
        self._rslora = bool(config.get("use_rslora"))
        self._ranks = _ByName(config, "rank_pattern", "r")
        self._alphas = _ByName(config, "alpha_pattern", "lora_alpha")
        self._parameters = tuple(f".{target}" for target in config.get("target_parameters") or ())
        self.whole: dict[str, Stored] = {}
        self.updates: dict[str, Update] = {}
        self._file = folder / ADAPTER_WEIGHTS
        if not self._file.is_file():
            raise ValueError(f"{folder}: found no {ADAPTER_WEIGHTS}, allowed are adapters in that file")
        modules: dict[str, dict[str, Region]] = {}
        for name, region in regions(read_header(self._file)).items():
            bare = name.removeprefix(PREFIX)
            if bare.endswith(".base_layer.weight"):  # of a head that is adapted, which PEFT saves along
                bare = bare.removesuffix(".base_layer.weight") + ".weight"
            module, _, factor = bare.removesuffix(".weight").rpartition(".")
            if region.dtype not in PLAIN:
                raise ValueError(f"{self._file}: {name:.200} is {region.dtype}, allowed are {', '.join(PLAIN)}")
            if factor in ("lora_A", "lora_B"):
                modules.setdefault(module, {})[factor] = region
            elif bare not in self.whole and (region.shape == shapes.get(bare) or bare in CLASSIFIER_HEADS):
                self.whole[bare] = plain(region)
            else:
                found = f"{name:.200} {list(region.shape)}"
                raise ValueError(f"{self._file}: {found} is neither a factor of plain LoRA nor one tensor of the base")
        for module, pair in modules.items():
            if pair.keys() != {"lora_A", "lora_B"}:
                raise ValueError(f"{self._file}: {module:.200} has {', '.join(pair)}, allowed are lora_A and lora_B")
            if ".mlp.experts" in module:
                self._add_experts(module, pair, modules, shapes)
            else:
                name = f"{module}.weight"
                self._check_shapes(module, pair, shapes.get(name), 1)
                key = name if self._is_parameter(name) else module
                scaling = self._scaling(key, pair["lora_A"].shape[0])
                self.updates[name] = Update(pair["lora_A"], pair["lora_B"], scaling, slice(None))
        if not self.updates and not self.whole:
            raise ValueError(f"{self._file}: holds no tensor, allowed are those of an adapter")
        self._factor = lru_cache(maxsize=2)(Region.read)  # of B, which all experts of a layer share

    def _add_experts(
        self, module: str, pair: dict[str, Region], modules: Collection[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        prefix = module.split(".base_layer")[0]
        parameter = self._parameter(module, prefix, modules)
        experts = next(e for e in count() if f"{prefix}.{e}.up_proj.weight" not in shapes)
        width, hidden = shapes.get(f"{prefix}.0.gate_proj.weight", (0, 0))
        shape = (2 * width, hidden) if parameter == EXPERT_WEIGHTS[0] else (hidden, width)
        self._check_shapes(f"{prefix}.{parameter}", pair, shape if experts else None, experts)
        a, b = pair["lora_A"], pair["lora_B"]
        scaling = self._scaling(f"{prefix}.{parameter}", a.shape[0] // experts)
        parts = {"down_proj": slice(None)}
        if parameter == EXPERT_WEIGHTS[0]:
            parts = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
        for expert in range(experts):
            for part, rows in parts.items():
                update = Update(a, b, scaling, rows, expert, experts)
                self.updates[f"{prefix}.{expert}.{part}.weight"] = update

    def _parameter(self, module: str, prefix: str, modules: Collection[str]) -> str:
        """Which of the experts' two weights: with both adapted, PEFT wraps the layer's first one first."""
        if module != prefix:
            return EXPERT_WEIGHTS[0]
        if f"{prefix}.base_layer" in modules:
            return EXPERT_WEIGHTS[1]
        found = [weight for weight in EXPERT_WEIGHTS if self._is_parameter(f"{prefix}.{weight}")]
        if len(found) != 1:
            problem = f"target_parameters names {len(found)} weights of {prefix}, its file has factors for one"
            raise ValueError(f"{self.folder / ADAPTER_CONFIG}: {problem}")
        return found[0]

    def _check_shapes(self, name: str, pair: dict[str, Region], shape: tuple[int, ...] | None, experts: int) -> None:
        if shape is None or len(shape) != 2:
            raise ValueError(f"{self._file}: {name:.200} is adapted, but no weight of the base")
        a, b = pair["lora_A"].shape, pair["lora_B"].shape
        ranks = a[0] if a else 0
        if a != (ranks, shape[1]) or b != (shape[0], ranks) or not ranks or ranks % experts:
            found = f"{name:.200} has lora_A {list(a)} and lora_B {list(b)}"
            weights = f"{list(shape)}" + (f" of each of {experts} experts" if experts > 1 else "")
            raise ValueError(f"{self._file}: {found}, which do not fit the base's {weights}")

    def _is_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names it, by PEFT's rule."""
        return f".{name}".endswith(self._parameters)

    def _scaling(self, key: str, rank: int) -> float:
        """What multiplies `B A` of the module or parameter `key`."""
        r, alpha = self._ranks[key], self._alphas[key]
        if r != rank or alpha is None:
            found = f"found rank {r!r:.50} and alpha {alpha!r:.50} for {key:.200}, whose factors have rank {rank}"
            raise ValueError(f"{self.folder / ADAPTER_CONFIG}: {found}")
        return alpha / (rank**0.5 if self._rslora else rank)

    def recorded_labels(self) -> list[str]:
        """Names of the classes, in the order of the logits, by the run's record beside the adapter; else none.

        Raises:
            ValueError: the record is no JSON, or too long.
        """
        match self._record():
            case {"task": {"labels": [*labels]}} if all(isinstance(label, str) for label in labels):
                return labels if len(set(labels)) == len(labels) else []
        return []

    def was_trained_on_nf4(self) -> bool:
        """Whether the run's record says that its base was quantized (QLoRA). Raises as `recorded_labels`."""
        match self._record():
            case {"recipe": {"quantize": "nf4"}}:
                return True
        return False

    def _record(self) -> object:
        path = self.folder / RECORD
        return read_json(path) if path.is_file() else None

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The official tensor `name` with the adapter; in fp32 or fp64 where it is adapted."""
        update = self.updates.get(name)
        if update is None:
            return tensor
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        rank = update.a.shape[0] // update.experts
        a = update.a.rows(update.expert * rank, rank).read().to(dtype)
        b = self._factor(update.b).unflatten(1, (rank, update.experts))[update.rows, :, update.expert].to(dtype)
        return torch.addmm(tensor.to(dtype), b, a, alpha=update.scaling)


class _ByName:
    """A number for each module: that of the first pattern that fits its name, by PEFT's rule, or the default."""

    def __init__(self, config: dict[str, Any], field: str, default: str) -> None:
        self.default = config.get(default)
        patterns = config.get(field, {})
        self.patterns = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]

    def __getitem__(self, name: str) -> Any:
        return next((value for pattern, value in self.patterns if pattern.match(name)), self.default)
