"""Planned files: their layout as other libraries read it, and going on after every kind of interruption."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_v3.export.files import (
    JOURNAL,
    Journal,
    PartialFile,
    PlannedFile,
    plan_file,
    plan_safetensors,
    safetensors_head,
    write_index,
)
from deepseek_v3.export.steps import Output, Step

# odd sizes put every tensor after the first at an address that its type would not choose
TENSORS = {
    "a": torch.arange(7, dtype=torch.uint8),
    "b": torch.randn(3, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(0)),
    "c": torch.tensor(2**40, dtype=torch.int64),
    "d": torch.zeros(0, 4),
    "e": torch.randn(11, 3, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
    "f": torch.randn(1, 9, generator=torch.Generator().manual_seed(2)).bfloat16(),
}
NAMES = {torch.uint8: "U8", torch.float32: "F32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
NAMES[torch.bfloat16] = "BF16"


def step(*names: str) -> Step:
    outputs = tuple(Output(name, NAMES[TENSORS[name].dtype], tuple(TENSORS[name].shape)) for name in names)
    return Step(names, outputs, lambda read: (read(name) for name in names))


STEPS = [step("a", "b"), step("c"), step("d"), step("e", "f")]


def write(folder: Path, plan: PlannedFile, stop_after: int | None = None) -> PartialFile:
    """Write what is missing; `stop_after` steps, leave it as a killed process would."""
    folder.mkdir(exist_ok=True)
    with PartialFile(folder, plan, Journal(folder)) as file:
        for number, planned in enumerate(plan.steps[file.done :]):
            if number == stop_after:
                return file
            file.write_step(planned.run(TENSORS.__getitem__), 0.0)
        file.finish()
    return file


@pytest.fixture
def plan() -> PlannedFile:
    (planned,) = plan_safetensors(STEPS, 2**30)
    return planned


def test_the_safetensors_library_reads_the_file(plan: PlannedFile, tmp_path: Path) -> None:
    write(tmp_path, plan)
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL, "model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size == plan.n_bytes


def test_shards_hold_at_most_what_is_asked_for_and_never_split_a_step(tmp_path: Path) -> None:
    sizes = (5, 5, 30, 5, 5, 5)
    steps = [Step((), (Output(f"t{i}", "F32", (size,)),), lambda read: ()) for i, size in enumerate(sizes)]
    plans = plan_safetensors(steps, 48)
    assert [[output.name for s in p.steps for output in s.outputs] for p in plans] == [
        ["t0", "t1"], ["t2"], ["t3", "t4"], ["t5"],
    ]  # fmt: skip
    assert [p.name for p in plans] == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    write_index(tmp_path, plans, parameters=55)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 55, "total_size": 220}
    assert index["weight_map"]["t2"] == "model-00002-of-00004.safetensors" and len(index["weight_map"]) == 6


def test_one_file_has_no_index(plan: PlannedFile, tmp_path: Path) -> None:
    write_index(tmp_path, [plan], parameters=1)
    assert list(tmp_path.iterdir()) == []


def test_other_formats_choose_head_and_alignment(tmp_path: Path) -> None:
    plan = plan_file("x.gguf", b"head!", STEPS, alignment=32)
    assert all(offset % 32 == 0 for offset in plan.offsets) and plan.n_bytes % 32 == 0
    write(tmp_path, plan)
    data = (tmp_path / "x.gguf").read_bytes()
    assert data.startswith(b"head!" + bytes(27)) and len(data) == plan.n_bytes
    for tensor, offset in zip(TENSORS.values(), plan.offsets, strict=True):
        found = torch.frombuffer(bytearray(data[offset:]), dtype=torch.uint8)[: tensor.nbytes]
        assert torch.equal(found, tensor.reshape(-1).view(torch.uint8))
    used = sum(tensor.nbytes for tensor in TENSORS.values()) + 5
    assert data.count(0) >= plan.n_bytes - used


def test_the_digest_is_that_of_the_file(plan: PlannedFile, tmp_path: Path) -> None:
    file = write(tmp_path, plan)
    assert file.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("stop", range(5))
def test_going_on_gives_the_same_bytes(plan: PlannedFile, tmp_path: Path, stop: int) -> None:
    write(tmp_path / "whole", plan)
    first = write(tmp_path / "parts", plan, stop_after=stop)
    assert first.done == stop and (stop == 4) == (tmp_path / "parts" / "model.safetensors").exists()
    again = write(tmp_path / "parts", plan)
    assert again.sha256 == first.sha256 if stop == 4 else again.done == 4
    assert (tmp_path / "parts" / plan.name).read_bytes() == (tmp_path / "whole" / plan.name).read_bytes()
    assert not (tmp_path / "parts" / f"{plan.name}.partial").exists()


def _cut(folder: Path, plan: PlannedFile) -> int:
    file = folder / f"{plan.name}.partial"
    file.write_bytes(file.read_bytes()[: plan.offsets[3] - 1])  # inside "c"
    return 1


def _damage(folder: Path, plan: PlannedFile) -> int:
    file = folder / f"{plan.name}.partial"
    data = bytearray(file.read_bytes())
    data[plan.offsets[2]] ^= 1  # in "c", written by the second step
    file.write_bytes(data)
    return 1


def _damage_head(folder: Path, plan: PlannedFile) -> int:
    file = folder / f"{plan.name}.partial"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    return 0


def _unfinished_tensor(folder: Path, plan: PlannedFile) -> int:
    with (folder / f"{plan.name}.partial").open("ab") as file:
        file.write(b"half of the next tensor")
    return 3


def _torn_line(folder: Path, plan: PlannedFile) -> int:
    with (folder / JOURNAL).open("a") as file:
        file.write('{"file": "model.safetensors", "st')
    return 3


def _lost_journal(folder: Path, plan: PlannedFile) -> int:
    (folder / JOURNAL).unlink()
    return 0


def _lost_file(folder: Path, plan: PlannedFile) -> int:
    (folder / f"{plan.name}.partial").unlink()
    return 0


@pytest.mark.parametrize(
    "break_", [_cut, _damage, _damage_head, _unfinished_tensor, _torn_line, _lost_journal, _lost_file]
)
def test_what_is_damaged_is_written_again_and_nothing_else(plan: PlannedFile, tmp_path: Path, break_) -> None:
    write(tmp_path / "whole", plan)
    write(tmp_path / "parts", plan, stop_after=3)
    kept = break_(tmp_path / "parts", plan)
    read: list[str] = []
    with PartialFile(tmp_path / "parts", plan, Journal(tmp_path / "parts")) as file:
        assert file.done == kept
        for planned in plan.steps[file.done :]:
            file.write_step(planned.run(lambda name: read.append(name) or TENSORS[name]), 0.0)
        file.finish()
    assert read == [name for planned in STEPS[kept:] for name in planned.inputs]
    assert (tmp_path / "parts" / plan.name).read_bytes() == (tmp_path / "whole" / plan.name).read_bytes()
    assert Journal(tmp_path / "parts").of(plan.name)[-1]["sha256"] == file.sha256


def test_after_a_repair_the_next_interruption_loses_nothing(plan: PlannedFile, tmp_path: Path) -> None:
    write(tmp_path, plan, stop_after=3)
    _damage(tmp_path, plan)
    write(tmp_path, plan, stop_after=2)
    with PartialFile(tmp_path, plan, Journal(tmp_path)) as file:
        assert file.done == 3


def test_a_whole_file_that_was_damaged_since_is_written_again(plan: PlannedFile, tmp_path: Path) -> None:
    write(tmp_path, plan)
    good = (tmp_path / plan.name).read_bytes()
    (tmp_path / plan.name).write_bytes(good[:-1] + b"?")
    write(tmp_path, plan)
    assert (tmp_path / plan.name).read_bytes() == good


def test_a_whole_file_that_has_grown_is_cut_again(plan: PlannedFile, tmp_path: Path) -> None:
    write(tmp_path, plan)
    good = (tmp_path / plan.name).read_bytes()
    (tmp_path / plan.name).write_bytes(good + b"more")
    write(tmp_path, plan)
    assert (tmp_path / plan.name).read_bytes() == good


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("head", [b"heat", b"a head that is longer than it was"])
def test_a_file_with_another_head_is_written_anew(tmp_path: Path, head: bytes, stop: int) -> None:
    """As when the tokenizer in a GGUF file's head has changed."""
    write(tmp_path, plan_file("x.gguf", b"head", STEPS, 32), stop_after=stop)
    plan = plan_file("x.gguf", head, STEPS, 32)
    write(tmp_path, plan)
    write(tmp_path / "whole", plan)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole" / "x.gguf").read_bytes()


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([TENSORS["a"]], "b: planned, but its step ended before it"),
        ([TENSORS["a"], TENSORS["b"], TENSORS["c"]], "found a tensor more, torch.int64"),
        ([TENSORS["a"], TENSORS["b"].half()], r"b: found torch.float16 \[3, 5\], planned is F32 \[3, 5\]"),
        ([TENSORS["a"], TENSORS["b"].T], r"b: found torch.float32 \[5, 3\], planned is F32 \[3, 5\]"),
    ],
)
def test_a_step_must_keep_to_its_plan(plan: PlannedFile, tmp_path: Path, tensors: list, message: str) -> None:
    with PartialFile(tmp_path, plan, Journal(tmp_path)) as file, pytest.raises(ValueError, match=message):
        file.write_step(tensors, 0.0)
    assert Journal(tmp_path).lines == []


def test_a_step_that_fails_half_way_is_written_again(plan: PlannedFile, tmp_path: Path) -> None:
    def half() -> Iterator[torch.Tensor]:
        yield TENSORS["a"]
        raise RuntimeError("no more")

    with PartialFile(tmp_path, plan, Journal(tmp_path)) as file, pytest.raises(RuntimeError, match="no more"):
        file.write_step(half(), 0.0)
    write(tmp_path, plan)
    assert torch.equal(load_file(tmp_path / plan.name)["b"], TENSORS["b"])


def test_a_header_is_padded_to_eight_bytes() -> None:
    head = safetensors_head([Output("name", "BF16", (2, 3))])
    assert len(head) % 8 == 0 and int.from_bytes(head[:8], "little") == len(head) - 8
    assert json.loads(head[8:])["name"] == {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
