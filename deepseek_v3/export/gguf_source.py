"""A GGUF file of arch deepseek2 as the official tensors of a checkpoint: the export, backwards."""

from os import PathLike
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, Keys
from gguf.quants import dequantize

from ..configuration import DeepseekV3Config
from ..gguf_header import TYPES, read_header
from .gguf_metadata import ARCHITECTURE, block_count, read_config
from .gguf_quantize import CHUNK, PLAIN, type_bytes
from .gguf_tensors import HEAD, Place, join_kv_b, official_shapes, places

PACKED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
READABLE = {*PLAIN, *(GGMLQuantizationType[name] for name in PACKED)}
COPIES = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")  # which files of others may hold


class GGUFSource:
    """The official tensors in a GGUF file, with the names and meaning of `Source`. Making one reads the header.

    Attributes:
        path: of the file.
        metadata: key -> scalar or string; of arrays only the length, as a tuple.
        config: what the metadata says of the model. Differently put than in the checkpoint it came from may be groups
            of experts that are no limit, and a `mscale` of YaRN as `attention_factor`.
        fields: those of `config` that the file says something of; the others have their defaults.
        names: official names in the model's order, the head last.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """
        Raises:
            ValueError: no file, not a whole GGUF file, of another architecture, with keys or tensors that are missing,
                too many or do not fit; names file and field.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: there is no such file")
        self.metadata, self._tensors, _ = read_header(self.path)
        architecture = self.metadata.get(Keys.General.ARCHITECTURE)
        if architecture != ARCHITECTURE:
            found = f"{Keys.General.ARCHITECTURE} is {architecture!r:.100}"
            raise ValueError(f"{self.path}: {found}, allowed is {ARCHITECTURE!r}")
        self.config = self._read_config()
        self._shapes = official_shapes(self.config)
        self.names = list(self._shapes)
        layout = places(self.config)
        self._check(layout)
        self._places: dict[str, list[Place]] = {}
        for place in layout.values():
            for name in place.sources:
                self._places.setdefault(name, []).append(place)

    def _read_config(self) -> DeepseekV3Config:
        try:
            fields = read_config(self.metadata)
            fields |= {"tie_word_embeddings": HEAD not in self._tensors, "architectures": ["DeepseekV3ForCausalLM"]}
            config = DeepseekV3Config(**fields)
            self.fields = frozenset(fields)
        except KeyError as error:
            raise ValueError(f"{self.path}: the key {error.args[0]} is missing") from None
        except (TypeError, ValueError) as error:  # of another type than the key has, or outside the field's range
            raise ValueError(f"{self.path}: metadata: {error}") from None
        # before the names of all tensors are made; no type has less than a quarter of a byte per weight
        size, count, blocks = self.path.stat().st_size, len(self._tensors), block_count(config)
        layers = max(0, blocks - config.first_k_dense_replace)
        least = layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size // 4
        if blocks > count or least > size:
            found = f"found {count} tensors in {size:,} bytes"
            told = f"{blocks} layers with {config.n_routed_experts} experts of {least:,} bytes or more"
            raise ValueError(f"{self.path}: {found}, the metadata says {told}")
        return config

    def _check(self, layout: dict[str, Place]) -> None:
        there = {name: info for name, info in self._tensors.items() if name in layout}
        problems = {
            "missing": [name for name in layout if name not in there],
            "unexpected": [name for name in self._tensors if name not in there and not name.endswith(COPIES)],
            "of another shape": [
                f"{name} is {list(info.shape)} instead of {list(layout[name].shape)}"
                for name, info in there.items()
                if info.shape != layout[name].shape
            ],
            "of a type that is not read": [
                f"{name} is {TYPES[info.kind][0]}" for name, info in there.items() if info.kind not in READABLE
            ],
        }
        if texts := [f"{len(found)} {what}: {', '.join(found[:4])}" for what, found in problems.items() if found]:
            raise ValueError(f"{self.path}: the tensors do not fit the metadata: {'; '.join(texts)}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def kind(self, name: str) -> GGMLQuantizationType:
        """GGUF's type of an official tensor."""
        return GGMLQuantizationType(self._tensors[self._places[name][0].name].kind)

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` returns: the file's own for F32, F16 and BF16, fp32 for the quantized types."""
        return PLAIN.get(self.kind(name), torch.float32)

    def is_quantized(self, name: str) -> bool:
        """Whether the file holds codes and scales of it, or of a part."""
        return any(self._tensors[place.name].kind not in PLAIN for place in self._places[name])

    def read(self, name: str) -> torch.Tensor:
        """One official tensor, dequantized. Nothing of it is kept."""
        parts = {place.name.split(".", 2)[-1]: self._read_piece(place, name) for place in self._places[name]}
        return join_kv_b(parts) if len(parts) > 1 else next(iter(parts.values()))

    def _read_piece(self, place: Place, name: str) -> torch.Tensor:
        """What `place` holds of the official tensor `name`: all of it, or the slice of an expert."""
        info = self._tensors[place.name]
        part = info._replace(shape=place.piece)
        start = info.start + place.sources.index(name) * part.n_bytes
        packed = torch.empty(part.n_bytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(memoryview(packed.numpy())) != part.n_bytes:
                raise ValueError(f"{self.path}: tensor {place.name}: ends before byte {start + part.n_bytes:,}")
        return from_bytes(packed, part.shape, GGMLQuantizationType(part.kind))


def from_bytes(packed: torch.Tensor, shape: tuple[int, ...], kind: GGMLQuantizationType) -> torch.Tensor:
    """The inverse of `to_bytes`: uint8 `[bytes]` -> `shape`, in fp32 if `kind` is quantized."""
    if kind in PLAIN:
        return packed.view(PLAIN[kind]).view(shape)
    rows = packed.numpy().reshape(-1, type_bytes(shape[-1:], kind))
    result = torch.empty(len(rows), shape[-1])
    step = max(1, CHUNK // shape[-1])
    for start in range(0, len(rows), step):
        result[start : start + step] = torch.from_numpy(dequantize(rows[start : start + step], kind))
    return result.view(shape)


def read_gguf(path: str | PathLike[str]) -> GGUFSource:
    """A GGUF file of arch deepseek2, ours or one of llama.cpp's converter, as official tensors; see `GGUFSource`."""
    return GGUFSource(path)
