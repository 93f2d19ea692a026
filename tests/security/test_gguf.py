"""Hostile GGUF files: both readers of this package, of Llamas for `convert` and of what `export` wrote."""

import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek_v3.conversion import load_source
from deepseek_v3.export import export
from deepseek_v3.export.gguf_source import GGUFSource
from deepseek_v3.gguf_header import read_header
from tests.security.files import patched, position, write_llama
from tests.security.limits import assert_cheap, assert_refused, limited, measured


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> bytes:
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("exported")
    export(checkpoint, folder, "gguf", quantization="F32", progress=False)
    (file,) = folder.glob("*.gguf")
    return file.read_bytes()


def test_the_whole_files_are_read(llama, exported, tmp_path) -> None:
    file = tmp_path / "whole.gguf"
    file.write_bytes(llama)
    metadata, tensors, _ = read_header(file)
    assert metadata["llama.block_count"] == 2 and metadata["tokenizer.ggml.tokens"] == (261,)
    model, tokenizer = load_source(file)
    elements = sum(math.prod(info.shape) for info in tensors.values())
    assert elements == sum(parameter.numel() for parameter in model.parameters())
    assert len(tokenizer) >= 261 and model.dtype == torch.float32
    file.write_bytes(exported)
    assert GGUFSource(file).config.n_routed_experts == 8


HEADS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", ""),
    "three bytes": (lambda c: b"GGU", ""),
    "magic": (lambda c: b"GGML" + c[4:], ""),
    "version": (lambda c: patched(c, 4, "I", 99), "version"),
    "big-endian version": (lambda c: patched(c, 4, "I", 3 << 24), "version"),
    "2^62 tensors": (lambda c: patched(c, 8, "Q", 2**62), "number of tensors"),
    "2^40 fields": (lambda c: patched(c, 16, "Q", 2**40), "number of "),
    "one field more": (lambda c: patched(c, 16, "Q", int.from_bytes(c[16:24], "little") + 1), ""),
    "one tensor more": (lambda c: patched(c, 8, "Q", int.from_bytes(c[8:16], "little") + 1), ""),
    "a key of 2^50 bytes": (lambda c: patched(c, 24, "Q", 2**50), ""),
    "a key that is not text": (lambda c: c[:32] + b"\xff\xfe" + c[34:], "UTF-8"),
    "an unknown type": (lambda c: patched(c, position(c, "general.architecture"), "I", 77), "type"),
    "a string of 2^63 bytes": (lambda c: patched(c, position(c, "general.architecture") + 4, "Q", 2**63), ""),
    "2^60 tokens": (lambda c: patched(c, position(c, "tokenizer.ggml.tokens") + 8, "Q", 2**60), ""),
    "2^20 tokens": (lambda c: patched(c, position(c, "tokenizer.ggml.tokens") + 8, "Q", 2**20), ""),
    "an array of arrays": (lambda c: patched(c, position(c, "tokenizer.ggml.tokens") + 4, "I", 9), ""),
    "10^9 dimensions": (lambda c: patched(c, position(c, "output_norm.weight"), "I", 10**9), "dimensions"),
    "a dimension of 2^62": (lambda c: patched(c, position(c, "output_norm.weight") + 4, "Q", 2**62), ""),
    "a dimension of 2^39": (lambda c: patched(c, position(c, "output_norm.weight") + 4, "Q", 2**39), ""),
    "an offset of 2^63": (lambda c: patched(c, position(c, "output_norm.weight") + 16, "Q", 2**63), ""),
    "two tensors in one place": (lambda c: patched(c, position(c, "output_norm.weight") + 16, "Q", 0), ""),
    "two tensors of one name": (lambda c: c.replace(b"blk.1.attn_norm", b"blk.0.attn_norm", 1), ""),
    "a tensor of another name": (lambda c: c.replace(b"output_norm.weight", b"output_morn.weight", 1), "norm.weight"),
    "truncated head": (lambda c: c[:400], ""),
    "truncated data": (lambda c: c[: len(c) // 2], ""),
    "zeros": (lambda c: bytes(10_000), ""),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_refused_by_the_reader_of_sources(name: str, llama, tmp_path) -> None:
    damage, message = HEADS[name]
    (tmp_path / "bad.gguf").write_bytes(damage(llama))
    assert_refused(limited(lambda: load_source(tmp_path / "bad.gguf")), tmp_path / "bad.gguf", message)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_refused_by_the_reader_of_exports(name: str, exported, tmp_path) -> None:
    damage, message = HEADS[name]
    (tmp_path / "bad.gguf").write_bytes(damage(exported))
    assert_refused(measured(lambda: GGUFSource(tmp_path / "bad.gguf")), tmp_path / "bad.gguf", message)


LLAMA = {
    "block_count": (0, 10**6, 2**32 - 1, 512),
    "embedding_length": (0, 2**32 - 1, 2**17),
    "feed_forward_length": (0, 2**32 - 1, 2**20),
    "attention.head_count": (0, 2**32 - 1, 4096, 3),
    "attention.head_count_kv": (0, 2**32 - 1, 4096),
    "vocab_size": (0, 2**32 - 1, 2**24),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LLAMA.items() for value in values])
def test_sizes_of_a_llama_are_refused(key: str, value: int, llama, tmp_path) -> None:
    """Before transformers builds a model of them."""
    content = patched(llama, position(llama, f"llama.{key}") + 4, "I", value)
    (tmp_path / "bad.gguf").write_bytes(content)
    assert_refused(limited(lambda: load_source(tmp_path / "bad.gguf")), tmp_path / "bad.gguf")


V3 = {
    "block_count": (0, 10**6, 2**32 - 1, 1000),
    "embedding_length": (0, 2**32 - 1, 2**17),
    "expert_count": (0, 10**7, 16384),
    "attention.head_count": (0, 2**32 - 1, 4096),
    "vocab_size": (0, 10**9, 2**24),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in V3.items() for value in values])
def test_sizes_of_an_export_are_refused(key: str, value: int, exported, tmp_path) -> None:
    content = patched(exported, position(exported, f"deepseek2.{key}") + 4, "I", value)
    (tmp_path / "bad.gguf").write_bytes(content)
    assert_refused(measured(lambda: GGUFSource(tmp_path / "bad.gguf")), tmp_path / "bad.gguf")


def test_another_architecture_is_refused_before_it_is_loaded(llama, exported, tmp_path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(exported)
    assert_refused(limited(lambda: load_source(file)), file, "general.architecture is 'deepseek2', allowed 'llama'")
    file.write_bytes(llama)
    assert_refused(measured(lambda: GGUFSource(file)), file, "general.architecture is 'llama'")


def test_a_token_of_megabytes_is_cheap(llama, tmp_path) -> None:
    at = position(llama, "tokenizer.ggml.tokens") + 16
    length = struct.unpack_from("<Q", llama, at)[0]
    text = b"x" * 10_000_000
    file: Path = tmp_path / "long.gguf"
    file.write_bytes(llama[:at] + struct.pack("<Q", len(text)) + text + llama[at + 8 + length :])
    assert_cheap(measured(lambda: read_header(file)))
