"""A checkpoint to export, whatever it is stored in, as a set of official tensors that are read one at a time."""

import hashlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..configuration import DeepseekV3Config
from ..configuration.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..configuration.licence import licence_files
from ..durable import file_sha256
from ..modeling_deepseek_v3.checkpoint import check_tensors, mtp_copies, tensor_shapes
from ..modeling_deepseek_v3.weight_files import scan_folder
from ..tokenization import DeepseekV3Tokenizer, check_vocab
from ..tokenization.moonshot import RANKS
from .adapter import RECORD, Adapter, base_folder
from .decoding import stored_tensors
from .stored import Stored, bytes_of, regions

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 1024
HEADS = (HEAD, "score.weight", "score.bias")
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
GENERATION_CONFIG = "generation_config.json"
CAUSAL = "DeepseekV3ForCausalLM"
CLASSIFIERS = {"SEQ_CLS": "DeepseekV3ForSequenceClassification", "TOKEN_CLS": "DeepseekV3ForTokenClassification"}


class Source:
    """The official tensors of a checkpoint: plain (bf16, fp16, fp32), in FP8 blocks, in compressed-tensors' INT4 or
    INT8, or in bitsandbytes' NF4 or INT8; with a PEFT adapter, those of the merged model.

    Making one reads headers only, and checks them against the configuration.

    Attributes:
        folder: of the checkpoint, or of the adapter's base.
        config: the configuration, without `quantization_config`, with `architectures`. A tied head is untied by an
            adapter that trained the embedding: it stays the base's embedding, as in PEFT's own merge.
        quantization: the checkpoint's own `quantization_config`.
        names: official names in the model's order, the final norm and the head last. The copies of embedding and head
            that checkpoints keep in their MTP layers are not among them.
        copies: name of each of those copies -> the tensor that it repeats.
        adapter: what is merged, or None.
        dropped: names that the model has no place for: head and MTP layers, under a classifier's adapter; MTP layers,
            after `leave_out_mtp`.
        files: the checkpoint's files of weights.
        tokenizer_folder: where the tokenizer is, the adapter's if it has one; None without a tokenizer.
        notes: what a user has to know of the model, in sentences.
    """

    def __init__(self, folder: str | PathLike[str], adapter: str | PathLike[str] | None = None) -> None:
        """
        Args:
            folder: a checkpoint, or a PEFT adapter whose configuration names a base that is a local folder.
            adapter: a PEFT adapter to merge into the checkpoint.

        Raises:
            ValueError: a file or field that cannot be read or does not fit; names it, with what is allowed.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"source: found {str(folder)!r}, allowed is a local folder")
        if (self.folder / ADAPTER_CONFIG).is_file() and not (self.folder / "config.json").is_file():
            if adapter is not None:
                raise ValueError(f"adapter: found one with {self.folder}, which is an adapter itself; allowed is one")
            adapter, self.folder = self.folder, base_folder(self.folder)

        where = str(self.folder / "config.json")
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{where}: not there; allowed is the folder of a checkpoint")
        self.config = DeepseekV3Config.from_pretrained(self.folder)
        self.quantization: dict | None = getattr(self.config, "quantization_config", None)
        if self.quantization is not None:
            del self.config.quantization_config
        architectures = self.config.architectures = self.config.architectures or [CAUSAL]
        classifier = architectures in [[name] for name in CLASSIFIERS.values()]
        if architectures != [CAUSAL] and not classifier:
            allowed = ", ".join([CAUSAL, *CLASSIFIERS.values()])
            raise ValueError(f"{where}: architectures is {architectures!r:.100}, allowed is one of {allowed}")

        entries = scan_folder(self.folder)
        found = regions(entries)
        self.files = sorted({region.file for region in found.values()})
        mtp = not classifier and self.config.num_nextn_predict_layers > 0
        self._tied = self.config.tie_word_embeddings  # in the files
        self._stored = stored_tensors(entries, found, self.quantization, self.config, mtp, where)
        official = {name: stored.entry for name, stored in self._stored.items()}
        check_tensors(official, self.config, str(self.folder), lm_head=not classifier, mtp=mtp)
        self._set_names(classifier)

        self.dropped: list[str] = []
        self.notes: list[str] = []
        self.adapter: Adapter | None = None
        folders = [self.folder] if adapter is None else [Path(adapter), self.folder]
        self.tokenizer_folder = next((path for path in folders if (path / TOKENIZER).is_file()), None)
        if self.tokenizer_folder is None:
            self.notes.append(f"{self.no_tokenizer()}: none goes along")
        if adapter is None:
            self._check_head()
        else:
            self._add(Adapter(Path(adapter), {name: self.shape(name) for name in self.names}))

    def _add(self, adapter: Adapter) -> None:
        self.adapter = adapter
        if adapter.was_trained_on_nf4() and not (self.quantization or {}).get("load_in_4bit"):
            found = f"recipe.quantize is 'nf4', but {self.folder} is not in NF4"
            remedy = "export merged/, which `merge: true` of the same recipe writes without training again"
            raise ValueError(f"{adapter.folder / RECORD}: {found}; {remedy}")
        if adapter.task_type in CLASSIFIERS:  # such models have neither lm_head nor MTP layers
            before, copies = self.names, self.copies
            self.config.architectures = [CLASSIFIERS[adapter.task_type]]
            self._set_names(classifier=True, allowed={*before, *copies})
            kept = set(self.names)
            self.dropped = [name for name in before if name not in kept]
        causal = self.config.architectures == [CAUSAL]
        if causal and self._tied and EMBEDDING in {*adapter.whole, *adapter.updates}:
            self.config.tie_word_embeddings = False
            self._stored.setdefault(HEAD, self._stored[EMBEDDING])
            self._set_names(classifier=False)
        self.names += [name for name in adapter.whole if name not in self.names]
        merged = set(self.names)
        if lost := [name for name in adapter.updates if name not in merged]:
            found = f"{lost[0]} is adapted, but the merged model has no such tensor"
            raise ValueError(f"{adapter.folder / ADAPTER_WEIGHTS}: {found}")
        self._check_head()
        if "score.weight" in merged:
            self._set_labels(adapter)

    def _set_labels(self, adapter: Adapter) -> None:
        """What a classifier's configuration says beside its head: the labels, and the padding token of its batches."""
        count = self.config.num_labels = self.shape("score.weight")[0]  # anew where it was another number
        if len(labels := adapter.recorded_labels()) == count:
            self.config.id2label = dict(enumerate(labels))
            self.config.label2id = {label: number for number, label in enumerate(labels)}
        elif self.config.id2label == {number: f"LABEL_{number}" for number in range(count)}:
            record = adapter.folder / RECORD
            self.notes.append(f"{record} names no {count} labels: they are LABEL_0 to LABEL_{count - 1} in the result")
        if self.config.pad_token_id is None and self.tokenizer_folder is not None:
            tokenizer = DeepseekV3Tokenizer.from_pretrained(self.tokenizer_folder)
            check_vocab(tokenizer, self.config.vocab_size)
            self.config.pad_token_id = tokenizer.pad_token_id

    def _set_names(self, classifier: bool, allowed: Iterable[str] = ()) -> None:
        mtp = not classifier and self.config.num_nextn_predict_layers > 0
        tied = self.config.tie_word_embeddings and not classifier
        original = {HEAD: EMBEDDING} if tied else {}
        copies = mtp_copies(self.config) if mtp else {}
        self.copies = {copy: original.get(name, name) for copy, name in copies.items()}
        heads = HEADS[1:] if classifier else () if tied else HEADS[:1]
        self.names = [*tensor_shapes(self.config, mtp), *(name for name in heads if name in self._stored)]
        known = {*self.names, *self.copies, *original, *allowed}
        if unknown := [name for name in self._stored if name not in known]:
            found = f"{len(unknown)} tensors that the configuration has no place for: {', '.join(unknown[:4]):.400}"
            raise ValueError(f"{self.folder}: {found}")

    def leave_out_mtp(self) -> None:
        """Be the model without its MTP layers from now on."""
        self.config.num_nextn_predict_layers = 0
        kept = {*tensor_shapes(self.config, mtp=False), *HEADS}
        self.dropped += [name for name in self.names if name not in kept]
        self.names = [name for name in self.names if name in kept]
        self.copies = {}

    def _check_head(self) -> None:
        """A classifier has `score.weight [labels, hidden]`, which the configuration does not tell for certain."""
        if self.config.architectures[0] not in CLASSIFIERS.values():
            return
        shape = self.shape("score.weight") if "score.weight" in self.names else ()
        if len(shape) != 2 or shape[1] != self.config.hidden_size:
            found = f"score.weight is {list(shape)}" if shape else "no score.weight"
            raise ValueError(f"{self.folder}: found {found}, allowed is [labels, {self.config.hidden_size}]")

    def _at(self, name: str) -> Stored:
        whole = {} if self.adapter is None else self.adapter.whole
        return whole.get(name) or self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._at(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` returns where nothing is merged into it: the file's, bf16 for FP8, the scales' for INT4 and
        INT8, or the configuration's."""
        return self._at(name).dtype

    def is_quantized(self, name: str) -> bool:
        """Whether the file holds codes and scales of it."""
        return len(self._at(name).regions) > 1

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantized, with the adapter merged. Nothing of it is kept."""
        tensor = self._at(name).read()
        return tensor if self.adapter is None else self.adapter.merge(name, tensor)

    def read_finite(self, name: str) -> torch.Tensor:
        """As `read`; `ValueError` for NaN and infinity, which codes would hide."""
        tensor = self.read(name)
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: found numbers that are not finite, which cannot be quantized")
        return tensor

    def check_copies(self) -> None:
        """ValueError if a copy in an MTP layer, or a tied head, is another tensor than the one it should repeat."""
        tied = {HEAD: EMBEDDING} if self._tied else {}
        for copy, original in {**tied, **self.copies}.items():
            if copy in self._stored and not _same(self._stored[copy], self._stored[original]):
                found = f"{copy} differs from {original}, which it should repeat"
                raise ValueError(f"{self._stored[copy].regions[0].file}: {found}; an export would lose it")

    def no_tokenizer(self) -> str:
        """That there is none, and how to make one, in words."""
        remedy = "deepseek_v3.tokenization.convert_tiktoken makes one of tiktoken.model"
        return f"{self.folder}: found no {TOKENIZER}" + (f" ({remedy})" if (self.folder / RANKS).is_file() else "")

    def companions(self) -> dict[str, Path]:
        """Name -> file of what goes along with the weights: tokenizer, generation settings and licence."""
        found = licence_files(self.folder)
        if (folder := self.tokenizer_folder) is not None:
            files = (file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)))
            found |= {file.relative_to(folder).as_posix(): file for file in files}
        if (self.folder / GENERATION_CONFIG).is_file():
            found[GENERATION_CONFIG] = self.folder / GENERATION_CONFIG
        return found

    def fingerprint(self) -> str:
        """SHA-256 of what identifies the source without reading its tensors: configuration, headers, sizes, times, the
        files that go along, and of an adapter its files and labels."""
        running = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, file in self.companions().items():
            running.update(f"{name} {file_sha256(file)}".encode())
        for file in self.files:
            status = file.stat()
            running.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            with file.open("rb") as stream:
                running.update(stream.read(int.from_bytes(stream.read(8), "little")))
        if self.adapter is not None:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                running.update(file_sha256(self.adapter.folder / name).encode())
            running.update(repr(self.config.id2label).encode())
        return running.hexdigest()

    def record(self) -> dict[str, Any]:
        """For a report: names without their path, and the SHA-256 of every file of weights."""
        adapter = None
        if self.adapter is not None:
            path = self.adapter.folder / ADAPTER_WEIGHTS
            adapter = {"name": self.adapter.folder.resolve().name, "files": {path.name: file_sha256(path)}}
        return {
            "name": self.folder.resolve().name,
            "quantization": None if self.quantization is None else self.quantization.get("quant_method"),
            "files": {file.name: file_sha256(file) for file in self.files},
            "adapter": adapter,
        }


def _same(copy: Stored, original: Stored) -> bool:
    """Whether the bytes are equal, a part at a time."""
    if [region[1:3] for region in copy.regions] != [region[1:3] for region in original.regions]:
        return False
    for one, other in zip(copy.regions, original.regions, strict=True):
        for first in range(0, one.shape[0], COMPARED_ROWS):
            rows = min(COMPARED_ROWS, one.shape[0] - first)
            if not bytes_of(one.rows(first, rows).read()) == bytes_of(other.rows(first, rows).read()):
                return False
    return True
