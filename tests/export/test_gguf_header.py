"""GGUF files from a stranger: each loads, or is an error that names the file and what is wrong, at once."""

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.export.gguf import read_gguf
from deepseek_v3.gguf_header import TYPES, read_header
from tests.export.gguf_models import export_gguf, save_model

STRING, ARRAY, UINT32, UINT8, FLOAT32 = 8, 9, 4, 0, 6


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    return export_gguf(save_model(folder / "tiny"), folder / "out", "Q8_0")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(n_tensors: int = 0, n_keys: int = 0, rest: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def test_the_types_are_those_of_the_library() -> None:
    assert {kind: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType} == TYPES


@given(st.floats(width=32, allow_nan=False))
@settings(max_examples=300)
def test_single_precision_numbers_are_read_as_short_decimals(tmp_path_factory, value: float) -> None:
    file = tmp_path_factory.getbasetemp() / "number.gguf"
    file.write_bytes(header(n_keys=1, rest=key("x", FLOAT32, struct.pack("<f", value))))
    assert read_header(file).metadata == {"x": float(str(np.float32(value)))}


ONE = key("a", UINT32, struct.pack("<I", 1))
BAD = {
    "nothing": (b"", "found 0 bytes"),
    "another format": (header(magic=b"GGML"), "a GGUF file with"),
    "big-endian": (header(version=3 << 24), r"version is 50331648, allowed are \(2, 3\)"),
    "2^62 tensors": (header(n_tensors=2**62), "number of tensors is 4,611,686,018,427,387,904, allowed are at most"),
    "2^17 tensors in no bytes": (header(n_tensors=2**17), "tensor 0: 8 bytes from byte 24 on, but only 0 are left"),
    "2^40 keys": (header(n_keys=2**40), "number of keys is 1,099,511,627,776"),
    "a key of 2^50": (header(n_keys=1, rest=struct.pack("<Q", 2**50)), "key 0: length of a string is"),
    "a string of 2^50": (header(n_keys=1, rest=key("a", STRING, struct.pack("<Q", 2**50))), "key a: length of a"),
    "an array of 2^60": (
        header(n_keys=1, rest=key("a", ARRAY, struct.pack("<IQ", UINT8, 2**60))),
        "key a: number of elements is",
    ),
    "2^40 strings": (
        header(n_keys=1, rest=key("a", ARRAY, struct.pack("<IQ", STRING, 2**40))),
        "key a: number of strings is",
    ),
    "2^20 strings in no bytes": (
        header(n_keys=1, rest=key("a", ARRAY, struct.pack("<IQ", STRING, 2**20))),
        "key a: 8 bytes from",
    ),
    "nested arrays": (
        header(n_keys=1, rest=key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))),
        "key a: an array of arrays",
    ),
    "an unknown type": (header(n_keys=1, rest=key("a", 77, b"")), "key a: value type is 77"),
    "no UTF-8": (header(n_keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe"), "key 0: text that is not UTF-8"),
    "a key twice": (header(n_keys=2, rest=ONE + ONE), "key a: is there twice"),
    "a tensor twice": (header(n_tensors=2, rest=tensor("x") + tensor("x")), "tensor x: is there twice"),
    "no dimensions": (header(n_tensors=1, rest=tensor("x", ())), "tensor x: has 0 dimensions"),
    "2^31 dimensions": (
        header(n_tensors=1, rest=text("x") + struct.pack("<I", 2**31)),
        "tensor x: has 2147483648 dimensions",
    ),
    "an empty dimension": (header(n_tensors=1, rest=tensor("x", (4, 0))), r"tensor x: is \[0, 4\], allowed are"),
    "a huge dimension": (header(n_tensors=1, rest=tensor("x", (2**63,))), "tensor x: a dimension is"),
    "an unknown tensor type": (header(n_tensors=1, rest=tensor("x", kind=999)), "tensor x: type is 999"),
    "rows that fit no block": (header(n_tensors=1, rest=tensor("x", (33,), kind=8)), "rows of 33 in Q8_0"),
    "data beyond the end": (header(n_tensors=1, rest=tensor("x", (2**39, 2**39))), "tensor x: ends at byte"),
    "tensors over each other": (
        header(n_tensors=2, rest=tensor("x", (64,)) + tensor("y", (64,), offset=32) + bytes(1000)),
        "tensor y: offset is 32, allowed are multiples of 32 from 256 on",
    ),
    "an odd offset": (header(n_tensors=1, rest=tensor("x", offset=3) + bytes(99)), "tensor x: offset is 3"),
    "an odd alignment": (
        header(n_keys=1, rest=key("general.alignment", UINT32, struct.pack("<I", 24))),
        "key general.alignment: is 24, allowed are powers of two",
    ),
    "alignment 0": (
        header(n_keys=1, rest=key("general.alignment", UINT32, struct.pack("<I", 0))),
        "key general.alignment: is 0",
    ),
    "another architecture": (header(), "general.architecture is None, allowed is 'deepseek2'"),
    "no hyperparameters": (
        header(n_keys=1, rest=key("general.architecture", STRING, text("deepseek2"))),
        "the key deepseek2.expert_gating_func is missing",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_an_error_at_once(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(data.ljust(24, b"\0") if data else data)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match=f"bad.gguf: .*{message}"):
        read_gguf(file)
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        read_gguf(tmp_path / "none.gguf")


def replaced(file: Path, name: str, code: str, value: float, tmp_path: Path) -> Path:
    """A copy of `file` with another number under a key."""
    data = bytearray(file.read_bytes())
    start = data.index(text(name)) + len(text(name)) + 4
    data[start : start + struct.calcsize(code)] = struct.pack(code, value)
    copy = tmp_path / "changed.gguf"
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize(
    ("name", "code", "value", "message"),
    [
        ("deepseek2.expert_count", "<I", 16000, "4 layers with 16000 experts of 73,728,000 bytes or more"),
        ("deepseek2.expert_count", "<I", 12, "tensors do not fit the metadata: .* of another shape"),
        ("deepseek2.block_count", "<I", 2**31, "num_hidden_layers"),
        ("deepseek2.block_count", "<I", 1000, "found 74 tensors in .* bytes, the metadata says 1000 layers"),
        ("deepseek2.embedding_length", "<I", 128, "tensors do not fit the metadata: .* of another shape"),
        ("deepseek2.nextn_predict_layers", "<I", 0, "tensors do not fit the metadata: 4 unexpected: blk.3.nextn"),
        ("deepseek2.nextn_predict_layers", "<I", 2, "tensors do not fit the metadata: 4 missing: blk.2.nextn"),
        ("deepseek2.nextn_predict_layers", "<I", 9, "num_hidden_layers: found -5"),
        ("deepseek2.expert_gating_func", "<I", 1, "deepseek2.expert_gating_func: found 1, allowed is 2, sigmoid"),
        ("deepseek2.rope.freq_base", "<f", float("nan"), "rope_theta"),
        ("deepseek2.rope.dimension_count", "<I", 2**30, "qk_nope_head_dim|qk_rope_head_dim"),
        ("deepseek2.attention.head_count", "<I", 0, "num_attention_heads"),
    ],
)
def test_numbers_that_do_not_fit(
    name: str, code: str, value: float, message: str, valid: Path, tmp_path: Path
) -> None:
    file = replaced(valid, name, code, value, tmp_path)
    began = time.process_time()
    with pytest.raises(ValueError, match=f"changed.gguf: .*({message})"):
        read_gguf(file)
    assert time.process_time() - began < 1


def test_every_truncation_is_an_error(valid: Path, tmp_path: Path) -> None:
    data, file = valid.read_bytes(), tmp_path / "short.gguf"
    for size in [*range(0, 200, 7), *range(200, len(data), len(data) // 150), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="short.gguf"):
            read_gguf(file)


@settings(max_examples=300)
@given(st.data())
def test_changed_bytes_load_or_are_an_error(valid: Path, data: st.DataObject) -> None:
    content = bytearray(valid.read_bytes())
    _, tensors, _ = read_header(valid)
    end = min(info.start for info in tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from((1, 4, 8)))
        # half of the changes hit the counts, keys and tensor entries, and not the long vocabulary
        start = data.draw(st.integers(0, 1200) | st.integers(end - 5000, end - 1))
        content[start : start + width] = data.draw(st.binary(min_size=width, max_size=width))
    file = valid.with_name("fuzz.gguf")
    file.write_bytes(content)
    began = time.process_time()
    try:
        source = read_gguf(file)
    except ValueError as error:
        assert "fuzz.gguf" in str(error)
    else:
        for name in source.names[:3]:
            source.read(name)
    assert time.process_time() - began < 1
