"""Mutated files: each loads, or raises an error of ours that names the folder, in limited time and memory."""

import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Tokenizer
from deepseek_v3.configuration.adapter_file import read_adapter_config
from deepseek_v3.conversion import load_source
from deepseek_v3.export import export
from deepseek_v3.export.gguf_source import GGUFSource
from deepseek_v3.export.source import Source
from deepseek_v3.gguf_header import read_header
from tests.security.files import write_llama
from tests.security.limits import OURS, limited

SECONDS, GROWTH = 2.0, 500 * 10**6
FEW, MANY = 6, 400
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WORDS = "The quick brown fox jumps over the lazy dog, 1234 times."

scalars = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, -(2**40)]),
    st.sampled_from([1e308, 1e-320, -0.0, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "re:(a+)+$", "(a+)+$", "../x", "/etc/passwd", "\0", "\ud800", "fp8", "x" * 5000]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
values = st.one_of(scalars, st.sampled_from([[], {}, [[]], [0] * 2000, {"a": {}}]), st.lists(scalars, max_size=4))


def nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value; of long containers the first and last ones, so that all parts are met."""
    keys = list(content if isinstance(content, dict) else range(len(content)))
    for key in keys[:8] + keys[8:][-8:]:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from nodes(content[key])


@st.composite
def json_edits(draw: Any, content: Any) -> bytes:
    """`content` with one to three values replaced, removed, renamed or wrapped."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(nodes(content))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "rename", "add"]))
        if kind == "replace":
            container[key] = draw(values)
        elif kind == "remove":
            del container[key]
        elif kind == "wrap":
            container[key] = draw(st.sampled_from([[container[key]], {"a": container[key]}, str(container[key])]))
        elif isinstance(container, dict):
            container[draw(st.text(max_size=12))] = container.pop(key) if kind == "rename" else draw(values)
    return json.dumps(content).encode()


@st.composite
def byte_edits(draw: Any, content: bytes, until: int) -> bytes:
    """`content` with one to four bytes or runs changed, within the first `until` bytes."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(until, len(content))))
        kind = draw(st.sampled_from(["set", "set", "insert", "remove", "cut", "number"]))
        if kind == "set":
            content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
        elif kind == "remove":
            content = content[:at] + content[at + draw(st.integers(1, 30)) :]
        elif kind == "cut":
            content = content[:at]
        else:
            number = draw(st.sampled_from([0, 2**20, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]))
            content = content[:at] + struct.pack("<Q", number) + content[at + 8 :]
    return content


class Target:
    """A file, what reads it, and how it is mutated. `folder` holds whole files to begin with."""

    def __init__(self, folder: Path, name: str, read: Callable[[Path], Any], head: int | None = None) -> None:
        self.folder, self.file, self.read = folder, folder / name, read
        self.whole = self.file.read_bytes()
        self.until = len(self.whole) if head is None else head

    def mutations(self) -> st.SearchStrategy[bytes]:
        edits = byte_edits(self.whole, self.until)
        if self.file.suffix == ".json":
            return st.one_of(edits, json_edits(json.loads(self.whole)))
        if self.file.suffix == ".safetensors":
            header, data = json.loads(self.whole[8 : self.until]), self.whole[self.until :]
            with_length = json_edits(header).map(lambda raw: struct.pack("<Q", len(raw)) + raw + data)
            return st.one_of(edits, with_length)
        return edits

    def check(self, content: bytes) -> None:
        self.file.write_bytes(content)
        outcome = limited(lambda: self.read(self.folder))
        assert outcome.loaded or set(OURS) & set(outcome.classes), str(outcome)
        assert outcome.loaded or str(self.folder) in outcome.message, str(outcome)
        assert outcome.seconds < SECONDS and outcome.growth < GROWTH, str(outcome)


def encode(folder: Path) -> None:
    tokenizer = DeepseekV3Tokenizer.from_pretrained(folder)
    tokenizer.decode(tokenizer(WORDS).input_ids)


def shard(folder: Path) -> Path:
    names = list(load_file(folder / SINGLE))
    (folder / SINGLE).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    return folder


TARGETS = [
    "config", "quantized config", "index", "header", "export", "adapter_config", "adapter weights", "tokenizer",
    "tokenizer_config", "gguf", "exported gguf",
]  # fmt: skip


@pytest.fixture
def target(request, checkpoint, adapter, tmp_path) -> Target:
    def copied(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / source.name))

    name = request.param
    load = DeepseekV3ForCausalLM.from_pretrained
    header = 8 + int.from_bytes((checkpoint / SINGLE).read_bytes()[:8], "little")
    if name == "config":
        return Target(copied(checkpoint), "config.json", load)
    if name == "quantized config":
        export(checkpoint, tmp_path / "int8", "int8", progress=False)
        return Target(tmp_path / "int8", "config.json", load)
    if name == "index":
        return Target(shard(copied(checkpoint)), INDEX, load)
    if name in ("header", "export"):
        return Target(copied(checkpoint), SINGLE, load if name == "header" else Source, header)
    if name == "adapter_config":
        return Target(copied(adapter), "adapter_config.json", read_adapter_config)
    if name == "adapter weights":
        folder = copied(adapter)
        header = 8 + int.from_bytes((folder / "adapter_model.safetensors").read_bytes()[:8], "little")
        return Target(folder, "adapter_model.safetensors", lambda at: Source(checkpoint, at), header)
    if name.startswith("tokenizer"):
        return Target(copied(checkpoint), f"{name}.json", encode)
    if name == "gguf":
        file = write_llama(tmp_path / "tiny.gguf")
        return Target(tmp_path, "tiny.gguf", lambda at: load_source(at / "tiny.gguf"), read_header(file).n_bytes)
    export(checkpoint, tmp_path / "exported", "gguf", quantization="F32", progress=False)
    (file,) = (tmp_path / "exported").glob("*.gguf")
    return Target(file.parent, file.name, lambda at: GGUFSource(at / file.name), read_header(file).n_bytes)


def fuzz(target: Target, examples: int) -> None:
    assert limited(lambda: target.read(target.folder)).loaded

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(target.mutations())
    def run(content: bytes) -> None:
        target.check(content)

    run()


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_a_few_mutations(target: Target) -> None:
    fuzz(target, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_many_mutations(target: Target) -> None:
    fuzz(target, MANY)
