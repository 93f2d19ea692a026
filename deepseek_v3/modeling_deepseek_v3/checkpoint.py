"""Official checkpoint names and shapes, and loading and saving that keeps to them.

On disk every expert is three tensors (`mlp.experts.7.gate_proj.weight` ...); in memory the experts of a layer are two.
transformers' conversion mapping does that both ways. This module makes loading strict, hands quantized checkpoints to
`quantization`, and writes the MTP modules with the copies of embedding and head that official checkpoints have.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.modeling_utils import PreTrainedModel, str_to_torch_dtype

from ..configuration import DeepseekV3Config, num_parameters
from ..configuration.untrusted import check_generation_file
from .weight_files import TensorEntry, scan_folder, weight_names

if TYPE_CHECKING:
    from ..hub import PushResult

FP8_SUFFIX = "_scale_inv"
FLOATING = ("BF16", "F16", "F32", "F64")  # what a tensor that is not quantized can be, as safetensors names it
# arguments of `from_pretrained` that override the configuration; the labels' number is no field of it
_CONFIG_ARGUMENTS = {*DeepseekV3Config.__dataclass_fields__, *DeepseekV3Config.attribute_map, "num_labels"}
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")

# Registered because transformers gives its own mapping for this model type to no class outside transformers.
register_checkpoint_conversion_mapping(
    "deepseek_v3",
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)


def tensor_shapes(config: DeepseekV3Config, mtp: bool) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor a checkpoint of `config` must hold; without `lm_head`."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_dim = heads * config.qk_head_dim
    latent_dim = config.kv_lora_rank + config.qk_rope_head_dim
    attention: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        attention["q_proj.weight"] = (query_dim, hidden)
    else:
        attention["q_a_proj.weight"] = (config.q_lora_rank, hidden)
        attention["q_a_layernorm.weight"] = (config.q_lora_rank,)
        attention["q_b_proj.weight"] = (query_dim, config.q_lora_rank)
    attention["kv_a_proj_with_mqa.weight"] = (latent_dim, hidden)
    attention["kv_a_layernorm.weight"] = (config.kv_lora_rank,)
    attention["kv_b_proj.weight"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    attention["o_proj.weight"] = (hidden, heads * config.v_head_dim)
    if config.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            if f"{name}.weight" in attention:
                attention[f"{name}.bias"] = attention[f"{name}.weight"][:1]

    def mlp(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (size, hidden),
            f"{prefix}up_proj.weight": (size, hidden),
            f"{prefix}down_proj.weight": (hidden, size),
        }

    moe: dict[str, tuple[int, ...]] = {
        "gate.weight": (config.n_routed_experts, hidden),
        "gate.e_score_correction_bias": (config.n_routed_experts,),
        **mlp("shared_experts.", config.moe_intermediate_size * config.n_shared_experts),
    }
    for expert in range(config.n_routed_experts):
        moe.update(mlp(f"experts.{expert}.", config.moe_intermediate_size))
    dense = mlp("", config.intermediate_size)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    depth = config.num_nextn_predict_layers if mtp else 0
    for layer in range(config.num_hidden_layers + depth):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}": shape for name, shape in attention.items()}
        block = dense if layer < config.first_k_dense_replace else moe
        shapes |= {f"{prefix}mlp.{name}": shape for name, shape in block.items()}
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        if layer >= config.num_hidden_layers:
            shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
            shapes[f"{prefix}eh_proj.weight"] = (hidden, 2 * hidden)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def linear_shapes(config: DeepseekV3Config, mtp: bool) -> dict[str, tuple[int, int]]:
    """Official name, without ".weight", -> `(out, in)` of every linear layer; heads and routers are none."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in tensor_shapes(config, mtp).items()
        if len(shape) == 2 and name != "model.embed_tokens.weight" and not name.endswith(".mlp.gate.weight")
    }


def mtp_copies(config: DeepseekV3Config) -> dict[str, str]:
    """Names under which official checkpoints repeat the embedding and the head in each MTP layer -> the original."""
    copies: dict[str, str] = {}
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        copies[f"{prefix}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{prefix}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit() else -1


def _shorten(names: list[str]) -> str:
    return ", ".join(f"{name:.200}" for name in names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")


def check_tensors(
    entries: Mapping[str, TensorEntry],
    config: DeepseekV3Config,
    where: str,
    *,
    lm_head: bool,
    mtp: bool,
    quantized: Mapping[str, Mapping[str, tuple[tuple[str, ...], tuple[int, ...] | None]]] | None = None,
) -> None:
    """Compare a checkpoint's headers with what `config` needs.

    `lm_head`, `mtp`: whether the model to load has them; a checkpoint may hold more heads than the model uses.
    `quantized`: linear layer -> suffix -> types and shape (None: any) of the tensors that lie there instead of its
    ".weight".

    Raises:
        ValueError: counts and names missing and unexpected tensors, and those of another type or shape.
    """
    # a bare DeepseekV3Model is saved without the "model." prefix
    bare = "embed_tokens.weight" in entries
    found = {f"model.{name}" if bare else name: entry for name, entry in entries.items()}
    expected: dict[str, tuple[int, ...] | None] = {**tensor_shapes(config, mtp)}
    for prefix in {name.split(".experts.")[0] for name in expected if ".experts." in name}:
        if f"{prefix}.experts.gate_up_proj" in found:  # saved with save_original_format=False
            expected = {name: shape for name, shape in expected.items() if not name.startswith(f"{prefix}.experts.")}
            sizes = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
            expected[f"{prefix}.experts.gate_up_proj"] = (sizes[0], 2 * sizes[1], sizes[2])
            expected[f"{prefix}.experts.down_proj"] = (sizes[0], sizes[2], sizes[1])
    head = {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    if lm_head and not config.tie_word_embeddings:
        expected |= head
    types: dict[str, tuple[str, ...]] = {}
    for layer, parts in (quantized or {}).items():
        expected.pop(f"{layer}.weight", None)
        for suffix, (allowed, shape) in parts.items():
            types[f"{layer}{suffix}"], expected[f"{layer}{suffix}"] = allowed, shape
    known = {**expected, **head, "score.weight": None, "score.bias": None, **dict.fromkeys(mtp_copies(config))}

    missing = [name for name in expected if name not in found]
    unexpected, wrong, mistyped = [], [], []
    for name, entry in found.items():
        if name not in known:
            if mtp or _layer_of(name) < config.num_hidden_layers:
                unexpected.append(name)
            continue
        shape, dtypes = expected.get(name), types.get(name, FLOATING)
        if shape is not None and entry.shape != shape:
            needed = f"the configuration needs {list(shape)}"
            wrong.append(f"{name} is {list(entry.shape)} in {entry.file.name}, {needed}")
        elif name in expected and entry.dtype not in dtypes:
            needed = f"the configuration needs {' or '.join(dtypes)}"
            mistyped.append(f"{name} is {entry.dtype} in {entry.file.name}, {needed}")

    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_shorten(missing)}")
        if all(_layer_of(name) >= config.num_hidden_layers for name in missing):
            hint = "pass num_nextn_predict_layers=0, or write it into config.json, to do without"
            problems.append(f"only MTP layers are missing: {hint}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_shorten(unexpected)}")
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_shorten(wrong)}")
    if mistyped:
        problems.append(f"{len(mistyped)} of another type: {_shorten(mistyped)}")
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the configuration: {'; '.join(problems)}")


def own_config(config: PreTrainedConfig) -> DeepseekV3Config:
    """`config` itself, or ours with the content and kernel choices of transformers' own, which lacks our fields."""
    if isinstance(config, DeepseekV3Config):
        return config
    ours = DeepseekV3Config.from_dict(config.to_dict())
    ours._attn_implementation = config._attn_implementation
    ours._experts_implementation = config._experts_implementation
    return ours


class CheckpointMixin(PreTrainedModel):
    """Strict `from_pretrained`, and `save_pretrained` in the official layout."""

    _has_lm_head = False
    # what a checkpoint may hold beyond this model: copies in the MTP layers, heads and MTP layers it does not use
    _keys_to_ignore_on_load_unexpected = [
        r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",
        r"layers\.\d+\.(enorm|hnorm|eh_proj|shared_head|self_attn|mlp|input_layernorm|post_attention_layernorm)\.",
        r"^lm_head\.",
        r"^score\.",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint of official layout (bf16, fp16, fp32), sharded or not, or a quantized one.

        As `PreTrainedModel.from_pretrained`, except that the files are checked first and that a missing or unexpected
        tensor is an error. Quantized checkpoints (DeepSeek's FP8 blocks, compressed-tensors' W4A16 and W8A8,
        bitsandbytes' NF4 and LLM.int8()) keep their weights packed, but FP8 on a CPU is dequantized; the argument
        `quantization_config=deepseek_v3.quantization.packed_config(dequantize=...)` decides otherwise. Any other
        `quantization_config` is applied to the dequantized weights.

        Raises:
            ValueError: names the file, the tensor or the field, what was found and what is allowed.
        """
        if isinstance(config, PreTrainedConfig):
            config = own_config(config)
        arguments = dict(kwargs, config=config)
        strict = pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None
        folder = _local_folder(pretrained_model_name_or_path, kwargs) if strict else None
        if folder is None or not (folder / "config.json").is_file():  # a state dict, GGUF, or a PEFT adapter
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **arguments)

        if not isinstance(config, DeepseekV3Config):
            config_source = folder if config is None else config
            config_kwargs = {k: v for k, v in kwargs.items() if k in _CONFIG_ARGUMENTS}
            config = DeepseekV3Config.from_pretrained(config_source, **config_kwargs)
        if cls.can_generate() and (folder / "generation_config.json").is_file():
            check_generation_file(folder / "generation_config.json")
        entries = scan_folder(folder, kwargs.get("variant"))
        mtp = cls._has_lm_head and config.num_nextn_predict_layers > 0
        if getattr(config, "quantization_config", None) is not None:
            return cls._from_quantized(folder, entries, copy.deepcopy(config), mtp, *model_args, **kwargs)
        if not kwargs.get("ignore_mismatched_sizes"):
            check_tensors(entries, config, str(folder), lm_head=cls._has_lm_head, mtp=mtp)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **arguments)

    @classmethod
    def _from_config(cls, config, *, allow_large: bool = False, **kwargs):
        """A model without weights of a file, for `AutoModel.from_config`, which passes its arguments on.

        Raises:
            ValueError: the parameters need more than this machine's memory, unless `allow_large` or on another device.
        """
        if not allow_large:
            _check_memory(config, cls._has_lm_head, kwargs.get("dtype") or config.dtype)
        return super()._from_config(config, **kwargs)

    @classmethod
    def _from_quantized(
        cls,
        folder: Path,
        entries: Mapping[str, TensorEntry],
        config: DeepseekV3Config,
        mtp: bool,
        *model_args,
        quantization_config: Any = None,
        **kwargs,
    ):
        from ..quantization.loading import QuantizedCheckpoint

        checkpoint = QuantizedCheckpoint(entries, config, str(folder / "config.json"), mtp)
        check_tensors(
            entries, config, str(folder), lm_head=cls._has_lm_head, mtp=mtp, quantized=checkpoint.stored_tensors()
        )
        del config.quantization_config
        if config.dtype is None:
            bare = "embed_tokens.weight"
            config.dtype = str_to_torch_dtype[(entries.get(bare) or entries[f"model.{bare}"]).dtype]
        if checkpoint.stays_packed(quantization_config, kwargs.get("device_map")):
            config.quantization_config = checkpoint.packed_config()
            state_dict = checkpoint.packed_tensors()
        else:
            state_dict = checkpoint.dequantized_tensors()
            if not checkpoint.is_own(quantization_config):
                kwargs["quantization_config"] = quantization_config  # to quantize anew
        done = {*_HUB_ARGUMENTS, *_CONFIG_ARGUMENTS, "subfolder", "variant", "use_safetensors"} - {"dtype"}
        kwargs = {k: v for k, v in kwargs.items() if k not in done}
        model = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        loaded.config.name_or_path = loaded.name_or_path = str(folder)
        if loaded.can_generate() and (folder / "generation_config.json").is_file():
            loaded.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """As `PreTrainedModel.save_pretrained`: official names, per-expert tensors, MTP layers and the fp32 bias.

        A model with packed weights is written as the files that it was read from, whatever `state_dict` says.

        Raises:
            ValueError: with `push_to_hub=True`, which would upload without checks.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained: push_to_hub is True; allowed is a call of push_to_hub(repo_id) instead")
        if not getattr(self, "_hf_peft_config_loaded", False) and getattr(self, "hf_quantizer", None) is None:
            state_dict = self.with_mtp_copies(self.state_dict() if state_dict is None else state_dict)
        generation_config: Any = getattr(self, "generation_config", None)
        if hasattr(generation_config, "num_mtp_draft"):
            generation_config._from_model_config = False  # True: loading drops what transformers does not know
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        names = weight_names(kwargs.get("variant"))
        forms = [path for name in names if (path := Path(save_directory) / name).is_file()]
        if len(forms) == 2:  # one is of a save before, sharded differently
            min(forms, key=lambda path: path.stat().st_mtime_ns).unlink()

    def push_to_hub(self, repo_id: str, *, card: str | Path | None = None, **options: Any) -> "PushResult":
        """Publish the model with its card, checked before and compared after the upload: `hub.push_model`.

        Args:
            card: the model card, a file or its text; None takes that of the folder the model was loaded from.
            **options: `tokenizer`, `private`, `create_pr`, `revision`, `token`, `base_model` and more.

        Raises:
            ValueError: there is no card; and see `hub.push`.
        """
        from ..hub import push_model

        if card is None:
            card = Path(self.config.name_or_path) / "README.md"
            if not card.is_file():
                raise ValueError("push_to_hub: card is None, and the model was loaded from no folder with a README.md")
        return push_model(self, repo_id, card=card, **options)

    def with_mtp_copies(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`state_dict` and the copies of embedding and head that official checkpoints keep in their MTP layers."""
        result = dict(state_dict)
        for name, original in mtp_copies(self.config).items() if self._has_lm_head else ():
            source = result.get(original, result.get("model.embed_tokens.weight"))
            if isinstance(source, torch.Tensor) and source.device.type != "meta":
                result[name] = source.clone()
        return result


def _check_memory(config: DeepseekV3Config, lm_head: bool, dtype: torch.dtype | str | None) -> None:
    # what makes parameters elsewhere may be a device context, or accelerate's `init_empty_weights`
    if nn.LayerNorm(1).weight.device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    itemsize = (dtype or torch.get_default_dtype()).itemsize
    count = num_parameters(config)
    parameters = count.total + count.mtp if lm_head else count.total - count.head
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if parameters * itemsize > memory:
        found = f"{parameters:,} parameters of {itemsize} bytes"
        raise ValueError(f"config: found {found}, allowed are {memory:,} bytes of memory; or pass allow_large=True")


def _local_folder(name_or_path: Any, kwargs: Mapping[str, Any]) -> Path | None:
    """The folder with the files: the given one, or the Hub repository's snapshot (downloaded if necessary)."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        patterns = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub))
    subfolder = kwargs.get("subfolder")
    return folder / subfolder if subfolder else folder
