"""`gguf`: one file for llama.cpp, arch deepseek2, with tokenizer, chat template and MTP layers."""

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter

from ..configuration import DeepseekV3Config
from ..tokenization import DeepseekV3Tokenizer
from ..tokenization.files import check_vocab
from .files import PlannedFile, aligned, plan_file
from .gguf_metadata import ARCHITECTURE, add_hyperparameters, add_tokenizer, block_count, check_config
from .gguf_quantize import K_QUANTS, PLAIN, QUANTIZATIONS, Type, ggml_library, tensor_type, to_bytes, type_bytes
from .gguf_source import GGUFSource, read_gguf
from .gguf_tensors import KV_B, Place, places, split_kv_b
from .options import FormatOptions
from .source import Source
from .steps import Output, Read, Step

__all__ = ["GGUFSource", "Options", "files", "quantization_config", "read_gguf", "steps"]


@dataclass(frozen=True)
class Options(FormatOptions):
    """
    Attributes:
        quantization: the type of most weights; norms and routers are always F32. Rows that are no multiple of a type's
            block get another one, see `gguf_quantize.tensor_type`.
        mtp: with the MTP layers. llama.cpp older than August 2026 refuses a file that has them.
    """

    quantization: str = "BF16"
    mtp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization: found {self.quantization!r}, allowed are {', '.join(QUANTIZATIONS)}")


def steps(source: Source, options: Options) -> list[Step]:
    """One step per official tensor, in the order of the file; outputs are bytes, a GGUF tensor's last with padding.

    Raises:
        ValueError: a model that llama.cpp cannot run, or no quantizer for a K-quant.
    """
    if "lm_head.weight" not in source.names and not source.config.tie_word_embeddings:
        raise ValueError(f"{source.folder}: has no lm_head.weight, allowed in GGUF are causal models")
    config = _config(source, options)
    check_config(config)
    kinds = _types(config, options)
    if any(kind in K_QUANTS for kind in kinds.values()):
        ggml_library()
    result: list[Step] = []
    halves: list[Place] = []
    for place in places(config).values():
        if place.sources[0].endswith(KV_B):
            halves.append(place)
            if len(halves) == 2:
                result.append(_kv_b_step(config, halves, kinds))
                halves = []
        else:
            result += _plain_steps(place, kinds[place.name])
    consumed = {name for step in result for name in step.inputs}
    if left_out := tuple(name for name in source.names if name not in consumed):
        assert not options.mtp, left_out
        result.append(Step(left_out, (), lambda read: ()))
    return result


def _config(source: Source, options: Options) -> DeepseekV3Config:
    """What the file describes."""
    config = copy.deepcopy(source.config)
    if not options.mtp:
        config.num_nextn_predict_layers = 0
    return config


def _types(config: DeepseekV3Config, options: Options) -> dict[str, Type]:
    """Name of each GGUF tensor -> its type."""
    blocks, tied = block_count(config), config.tie_word_embeddings
    return {
        place.name: tensor_type(place.name, place.shape, options.quantization, blocks, tied)
        for place in places(config).values()
    }


def _plain_steps(place: Place, kind: Type) -> Iterable[Step]:
    """Write a tensor source by source: the experts of a layer never come together."""
    for i, name in enumerate(place.sources):
        output = _output(place, kind, i)

        def run(read: Read, name: str = name, output: Output = output) -> Iterable[torch.Tensor]:
            yield _padded(to_bytes(read(name), kind, name), output)

        yield Step((name,), (output,), run, quantized=kind not in PLAIN)


def _kv_b_step(config: DeepseekV3Config, halves: Sequence[Place], kinds: dict[str, Type]) -> Step:
    name = halves[0].sources[0]
    outputs = tuple(_output(place, kinds[place.name], 0) for place in halves)

    def run(read: Read) -> Iterable[torch.Tensor]:
        for place, half, output in zip(halves, split_kv_b(read(name), config), outputs, strict=True):
            yield _padded(to_bytes(half, kinds[place.name], name), output)

    return Step((name,), outputs, run, quantized=any(kinds[place.name] not in PLAIN for place in halves))


def _output(place: Place, kind: Type, i: int) -> Output:
    """The bytes of source `i` of `place`; tensors begin at multiples of the alignment, so the last source fills up."""
    n_bytes = type_bytes(place.piece, kind)
    if i == len(place.sources) - 1:
        whole = type_bytes(place.shape, kind)
        n_bytes += aligned(whole, GGUF_DEFAULT_ALIGNMENT) - whole
    return Output(place.name if len(place.sources) == 1 else f"{place.name}[{i}]", "U8", (n_bytes,))


def _padded(data: torch.Tensor, output: Output) -> torch.Tensor:
    missing = output.n_bytes - len(data)
    return torch.nn.functional.pad(data, (0, missing)) if missing else data


def files(source: Source, steps: Sequence[Step], options: Options) -> list[PlannedFile]:
    """The one file, `NAME-QUANTIZATION.gguf` after the source's folder, or that of the adapter which is merged.

    Raises:
        ValueError: no tokenizer, or one that llama.cpp would run differently.
    """
    name = (source.folder if source.adapter is None else source.adapter.folder).resolve().name
    return [plan_file(f"{name}-{options.quantization}.gguf", _head(source, options, name), steps)]


def _head(source: Source, options: Options, name: str) -> bytes:
    """Everything before the first tensor, written by the gguf library."""
    if source.tokenizer_folder is None:
        raise ValueError(f"{source.no_tokenizer()}, which a GGUF file has to hold")
    tokenizer = DeepseekV3Tokenizer.from_pretrained(source.tokenizer_folder)
    check_vocab(tokenizer, source.config.vocab_size)

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "head")
        writer = GGUFWriter(file, ARCHITECTURE)
        config = _config(source, options)
        kinds = _types(config, options)
        for place in places(config).values():
            kind = kinds[place.name]
            n_bytes = type_bytes(place.shape, kind)
            writer.add_tensor_info(place.name, place.shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        add_hyperparameters(writer, config, options.quantization, name)
        add_tokenizer(writer, tokenizer, config.vocab_size)
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = file.read_bytes()
    return head.ljust(aligned(len(head), GGUF_DEFAULT_ALIGNMENT), b"\0")


def quantization_config(source: Source, options: Options) -> dict | None:
    return None
