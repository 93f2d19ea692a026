"""Files that must be refused, by name: tensors that do not fit, broken files and indexes, links, pickles."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3Model
from tests.modeling_deepseek_v3.checkpoints import INDEX, SINGLE, change_tensors, official_tensors, write_official

CLASSES = [DeepseekV3ForCausalLM, DeepseekV3Model, DeepseekV3ForSequenceClassification]
Q_A = "model.layers.1.self_attn.q_a_proj.weight"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q_A), f"1 missing: {Q_A}"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1." in n], r"missing: .* \(\d+ in all\)"),
        (lambda t: t.update({"model.layers.1.self_attn.typo.weight": torch.ones(2)}), "1 unexpected: .*attn.typo"),
        (lambda t: t.update({Q_A: t[Q_A][:-1].clone()}), rf"1 of another shape: {Q_A} is \[47, 64\]"),
        (lambda t: t.update({Q_A: t[Q_A].T.contiguous()}), rf"{Q_A} is \[64, 48\].*needs \[48, 64\]"),
        (lambda t: (t.clear(), t.update({"bert.encoder.weight": torch.ones(2)})), r"missing: .*1 unexpected: bert"),
        (lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight"), "1 missing: .*experts.7.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(32, 64)}),
            "1 unexpected: .*experts.8.up_proj.weight",
        ),
        (lambda t: t.pop("model.layers.2.mlp.gate.e_score_correction_bias"), "1 missing: .*e_score_correction_bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_counted(change, message: str, cls, folder) -> None:
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        cls.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_mismatched_sizes_load_when_asked_for(model, folder) -> None:
    change_tensors(folder, lambda t: t.update({Q_A: t[Q_A][:-1].clone()}))
    loaded, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [key[0] for key in info["mismatched_keys"]] == [Q_A]
    assert loaded.get_parameter(Q_A).isfinite().all()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_missing_mtp_tensor_is_refused(folder) -> None:
    change_tensors(folder, lambda t: t.pop("model.layers.3.eh_proj.weight"))
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.3\.eh_proj"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**entries: dict) -> bytes:
    return json.dumps(entries).encode()


TWICE = b"{%s, %s}" % ((b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}',) * 2)
MANY_KEYS = b'{"a": 1, %s "a": 2}' % b"".join(b'"%d": 1, ' % i for i in range(200_000))
BROKEN_FILES = {
    "empty": (lambda f: f.write_bytes(b""), "0 bytes"),
    "seven bytes": (lambda f: f.write_bytes(b"1234567"), "7 bytes"),
    "header of 2^63 bytes": (lambda f: write_raw(f, b"{}", length=2**63), str(2**63)),
    "header of 200 MB": (lambda f: write_raw(f, b"{}", length=200_000_000), "200000000"),
    "header past the end": (lambda f: write_raw(f, b"{}", length=3), "header of 3 bytes"),
    "no json": (lambda f: write_raw(f, b"{not json"), "not valid JSON"),
    "no utf-8": (lambda f: write_raw(f, b'{"\xff\xfe": 1}'), "not valid JSON"),
    "a list": (lambda f: write_raw(f, b"[]"), "is a list"),
    "nested": (lambda f: write_raw(f, b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    "nested objects": (lambda f: write_raw(f, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "huge integer": (lambda f: write_raw(f, b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON|a: header entry"),
    "duplicate key": (lambda f: write_raw(f, TWICE, b"0" * 8), "duplicate key 'a'"),
    "duplicate among many keys": (lambda f: write_raw(f, MANY_KEYS), "duplicate key 'a'"),
    "a name of a megabyte": (lambda f: write_raw(f, header(**{"x" * 2**20: 3})), "xxx: header entry is 3"),
    "an entry of a megabyte": (lambda f: write_raw(f, header(a="x" * 2**20)), "a: header entry is 'xxx"),
    "unexpected names of a megabyte": (
        lambda f: write_raw(f, header(**{"x" * 2**20: entry(shape=[0], offsets=[0, 0])})),
        "1 unexpected: xxx",
    ),
    "entry is no object": (lambda f: write_raw(f, b'{"a": 3}'), "a: header entry is 3"),
    "bad dtype": (lambda f: write_raw(f, header(a=entry("F99")), b"0" * 8), "a: dtype is 'F99'"),
    "no dtype": (lambda f: write_raw(f, header(a={}), b"0" * 8), "a: dtype is None"),
    "dtype is a list": (lambda f: write_raw(f, header(a=entry([])), b"0" * 8), r"a: dtype is \[\]"),
    "shape is a number": (lambda f: write_raw(f, header(a=entry(shape=2)), b"0" * 8), "a: shape is 2"),
    "negative size": (lambda f: write_raw(f, header(a=entry(shape=[-2])), b"0" * 8), r"a: shape is \[-2\]"),
    "size is true": (lambda f: write_raw(f, header(a=entry(shape=[True])), b"0" * 8), r"a: shape is \[True\]"),
    "overflowing shape": (lambda f: write_raw(f, header(a=entry(shape=[2**39] * 8)), b"0" * 8), "a: 8 bytes"),
    "shape and bytes differ": (lambda f: write_raw(f, header(a=entry(shape=[3])), b"0" * 8), "a: 8 bytes .* needs 12"),
    "offsets backwards": (lambda f: write_raw(f, header(a=entry(offsets=[8, 0])), b"0" * 8), "a: data_offsets 8..0"),
    "offsets are text": (lambda f: write_raw(f, header(a=entry(offsets="08")), b"0" * 8), "a: data_offsets are '08'"),
    "negative offset": (lambda f: write_raw(f, header(a=entry(offsets=[-8, 0])), b"0" * 8), "a: data_offsets -8"),
    "past the end": (lambda f: write_raw(f, header(a=entry(offsets=[8, 16])), b"0" * 8), "a: .*outside the file's 8"),
    "overlap": (lambda f: write_raw(f, header(a=entry(), b=entry(offsets=[4, 12])), b"0" * 12), "b: data starts at"),
    "hole": (lambda f: write_raw(f, header(a=entry(), b=entry(offsets=[12, 20])), b"0" * 20), "b: data starts at"),
    "bytes left over": (lambda f: write_raw(f, header(a=entry()), b"0" * 9), "9 bytes of data"),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-1000]), "truncated"),
    "truncated in the header": (lambda f: f.write_bytes(f.read_bytes()[:200]), "not a whole safetensors file"),
    "a pickle": (lambda f: torch.save({"a": torch.ones(2)}, f), "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_refused_by_name(name: str, folder) -> None:
    damage, message = BROKEN_FILES[name]
    damage(folder / SINGLE)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        DeepseekV3ForCausalLM.from_pretrained(folder)
    assert str(folder / SINGLE if name != "unexpected names of a megabyte" else folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - start < 5


@pytest.fixture
def sharded(model, tmp_path) -> Path:
    write_official(tmp_path / "model", model.config, official_tensors(model), shards=2)
    return tmp_path / "model"


def remap(folder: Path, target: str) -> None:
    """Point one tensor of the index at `target`."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_A] = target
    (folder / INDEX).write_text(json.dumps(index))


def outside(folder: Path) -> Path:
    """A whole file with the tensor, beside the model's folder."""
    file = folder.parent / "secret.safetensors"
    shutil.copy(folder / "model-00001-of-000002.safetensors", file)
    return file


def link(folder: Path, name: str, target: Path | str) -> str:
    (folder / name).symlink_to(target)
    return name


def linked_folder(folder: Path) -> str:
    outside(folder)
    (folder / "sub").symlink_to(folder.parent)
    return "sub/secret.safetensors"


BROKEN_INDEXES = {
    "parent folder": (lambda f: remap(f, f"../{outside(f).name}"), "leaves the model folder"),
    "parent folder and back": (lambda f: remap(f, "../model/model-00001-of-000002.safetensors"), "leaves the model"),
    "absolute": (lambda f: remap(f, str(outside(f))), "leaves the model folder"),
    "symbolic link": (lambda f: remap(f, link(f, "x.safetensors", outside(f))), "leaves the model folder"),
    "link to a link": (
        lambda f: remap(f, link(f, "y.safetensors", f / link(f, "x.safetensors", outside(f)))),
        "leaves the model folder",
    ),
    "linked folder": (lambda f: remap(f, linked_folder(f)), "leaves the model folder"),
    "device": (lambda f: remap(f, "/dev/zero"), "is not the name of a safetensors file"),
    "no file name": (lambda f: remap(f, 7), "7 is not the name"),
    "a null byte": (lambda f: remap(f, "\0.safetensors"), "is not the name of a safetensors file"),
    "an overlong name": (lambda f: remap(f, "x" * 5000 + ".safetensors"), "is not the name of a safetensors file"),
    "half a character": (lambda f: remap(f, "\ud800.safetensors"), "is not the name of a safetensors file"),
    "another extension": (lambda f: remap(f, "pytorch_model.bin"), "is not the name of a safetensors file"),
    "absent file": (lambda f: remap(f, "model-00009-of-000002.safetensors"), "has no such file"),
    "a folder": (lambda f: (f / "d.safetensors").mkdir() or remap(f, "d.safetensors"), "has no such file"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "weight_map is NoneType"),
    "weight_map is a list": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "weight_map is list"),
    "weight_map is empty": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "weight_map is NoneType"),
    "index is no json": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index is no utf-8": (lambda f: (f / INDEX).write_bytes(b"\xff"), "not valid JSON"),
    "index with a duplicate": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        "duplicate key 'a'",
    ),
    "index is nested": (lambda f: (f / INDEX).write_text("[" * 100_000 + "]" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN_INDEXES)
def test_broken_indexes_are_refused_by_name(name: str, sharded) -> None:
    damage, message = BROKEN_INDEXES[name]
    damage(sharded)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        DeepseekV3ForCausalLM.from_pretrained(sharded)
    assert str(sharded / INDEX) in str(caught.value)
    assert time.monotonic() - start < 5


def test_tensor_in_another_shard_than_the_index_says(sharded) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = ({*index.values()} - {index[Q_A]}).pop()
    remap(sharded, other)
    with pytest.raises(ValueError, match=f"{other}.*{Q_A}"):
        DeepseekV3ForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("shard", [0, 1])
def test_tensor_in_two_shards_is_refused(shard: int, sharded) -> None:
    """Which of them would count is decided by the order of the files."""
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    name = next(name for name, file in index.items() if file == files[shard])
    other = sharded / files[1 - shard]
    save_file({**load_file(other), name: torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=name):
        DeepseekV3ForCausalLM.from_pretrained(sharded)


def test_missing_and_truncated_shards_are_refused_by_name(sharded) -> None:
    file = sharded / "model-00002-of-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=str(file)):
        DeepseekV3ForCausalLM.from_pretrained(sharded)
    file.unlink()
    with pytest.raises(ValueError, match=file.name):
        DeepseekV3ForCausalLM.from_pretrained(sharded)


def test_single_file_that_links_out_is_refused(folder) -> None:
    shutil.move(folder / SINGLE, folder.parent / "secret.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "secret.safetensors")
    with pytest.raises(ValueError, match="outside the model folder"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def test_pickles_are_not_read(folder) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(ValueError, match="no weights found"):
        DeepseekV3ForCausalLM.from_pretrained(folder)
    torch.save({"lm_head.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="found pytorch_model.bin, but only safetensors"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"hidden_size": "wide"}', '{"n_group": 7}'])
def test_broken_configuration_is_refused(content: str, folder) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError):
        DeepseekV3ForCausalLM.from_pretrained(folder)
