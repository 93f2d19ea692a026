"""`export` as a whole: interruptions of every kind, whose folder it is, what is accounted for, and the report."""

import ctypes
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from deepseek_v3 import DeepseekV3Config
from deepseek_v3.configuration.parameters import num_parameters
from deepseek_v3.export import Output, Source, Step, export, files, format_options, fp8, run
from deepseek_v3.export.run import check_steps
from deepseek_v3.modeling_deepseek_v3.checkpoint import tensor_shapes
from deepseek_v3.process import locked, peak_memory, reset_peak_memory
from deepseek_v3.tokenization import train_tokenizer
from tests.export.helpers import TOKENIZER, config_json, contents, read_tensors, write_checkpoint
from tests.modeling_deepseek_v3.helpers import run_python, tiny_config

SHARD = 60_000  # of a model of 660 KB in fp8


def in_child(function: Callable[[], Any]) -> int:
    """Run it in a process of its own, without another interpreter's start; returns how that ended."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads are not in the child
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_child(export_: Callable[[], Any]) -> None:
    """Run it in a process that kills itself somewhere on the way."""
    status = in_child(export_)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("reads", [1, 2, 40, 100, 130])
def test_an_export_that_is_killed_goes_on_to_the_same_bytes(
    ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    options = {"format": "fp8", "max_shard_bytes": 10 * SHARD, "progress": False}
    whole = export(ragged, tmp_path / "whole", **options)
    count, read = 0, Source.read

    def counting(source: Source, name: str) -> torch.Tensor:
        nonlocal count
        count += 1
        return kill() if count == reads else read(source, name)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", counting)
        killed_child(lambda: export(ragged, tmp_path / "parts", **options))
    assert {".export.json", ".lock"} <= {path.name for path in (tmp_path / "parts").iterdir()}
    monkeypatch.setattr(Source, "read", counting)
    count = 1000
    report = export(ragged, tmp_path / "parts", **options)
    assert count == 1000 + 133 - (reads - 1)  # nothing that was whole is read again
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert report["files"] == whole["files"]


def opening(cls: type) -> Callable:
    """`Path.open` with files of `cls` for new files of weights."""
    path_open = Path.open
    return lambda path, mode="r", *a, **k: cls(path, mode) if mode == "w+b" else path_open(path, mode, *a, **k)


class HalfWritten(io.FileIO):
    """Kills the process in the middle of the n-th large write."""

    left = 3

    def write(self, data: Any) -> int:
        if len(data) > 20_000:
            HalfWritten.left -= 1
            if not HalfWritten.left:
                super().write(data[: len(data) // 2])
                kill()
        return super().write(data)


def test_killed_in_the_middle_of_a_tensor(ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(ragged, tmp_path / "whole", "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening(HalfWritten))
        killed_child(lambda: export(ragged, tmp_path / "parts", "bf16"))
    partial = (tmp_path / "parts" / "model.safetensors.partial").stat().st_size
    assert 20_000 < partial < (tmp_path / "whole" / "model.safetensors").stat().st_size
    export(ragged, tmp_path / "parts", "bf16")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("function", ["write_index", "write_config", "copy_companions", "peak_memory"])
def test_killed_after_the_weights(
    ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    options = {"format": "bf16", "max_shard_bytes": 4 * SHARD}
    export(ragged, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(run, function, lambda *arguments: kill())
        killed_child(lambda: export(ragged, tmp_path / "parts", **options))
    export(ragged, tmp_path / "parts", **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_signal_stops_it_after_the_step(ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Source.read
    count = 0

    def stopping(source: Source, name: str) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(source, name)

    monkeypatch.setattr(Source, "read", stopping)
    with pytest.raises(InterruptedError, match=r"stopped in model.safetensors after step 7, saved"):
        export(ragged, tmp_path, "bf16")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    export(ragged, tmp_path, "bf16")
    assert count == 133  # each tensor once over both runs
    assert torch.equal(read_tensors(tmp_path)["model.norm.weight"], read_tensors(ragged)["model.norm.weight"])


def test_a_full_disk_is_an_error_that_can_be_gone_on_from(
    ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 200_000

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal room
            if room < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= len(data)
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening(Full))
        with pytest.raises(ValueError, match="no room left on the disk; make some, and run the same command again"):
            export(ragged, tmp_path / "out", "bf16")
    export(ragged, tmp_path / "out", "bf16")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(ragged).keys()


def test_room_is_checked_before_anything_is_written(
    ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 0, 10**6))
    with pytest.raises(ValueError, match="found 1,000,000 bytes free, the export needs"):
        export(ragged, tmp_path, "bf16")
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_export_is_not_done_again(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export(plain, tmp_path, "bf16")
    monkeypatch.setattr(Source, "read", None)
    assert export(plain, tmp_path, "bf16") == first == json.loads((tmp_path / "export.json").read_text())


def test_a_lost_file_that_goes_along_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    names = [*TOKENIZER, "generation_config.json", "LICENSE-MODEL", "additional_chat_templates/tool.jinja"]
    for name in names[-2:]:
        (source / name).write_text("{{ y }}")
    report = export(source, tmp_path / "out", "bf16")
    for name in names:
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "additional_chat_templates").rmdir()
    monkeypatch.setattr(Source, "read", None)
    assert export(source, tmp_path / "out", "bf16") == report
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_changed_file_that_goes_along_can_be_repaired_as_the_error_says(plain: Path, tmp_path: Path) -> None:
    report, file = export(plain, tmp_path, "bf16"), tmp_path / "tokenizer_config.json"
    content = file.read_bytes()
    for changed in (content.swapcase(), content + b" "):
        file.write_bytes(changed)
        message = "tokenizer_config.json: differs from that of the finished export; delete it, and the same command"
        with pytest.raises(ValueError, match=message):
            export(plain, tmp_path, "bf16")
        assert file.read_bytes() == changed and not (tmp_path / ".lock").exists()
        file.unlink()
        assert export(plain, tmp_path, "bf16") == report and file.read_bytes() == content


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_of_the_export_itself_asks_for_another_folder(plain: Path, tmp_path: Path, name: str) -> None:
    """Its bytes are not in the source; what is left goes, and the same command begins anew."""
    folder = tmp_path / "out"
    report = export(plain, folder, "bf16")
    message = rf"the finished export has \d+; delete {folder} or name another"
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: found 0 bytes, {message}"):
        export(plain, folder, "bf16")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: not there, {message}"):
        export(plain, folder, "bf16")
    shutil.rmtree(folder)
    assert export(plain, folder, "bf16")["files"] == report["files"]


def test_what_is_written_again_is_what_the_report_says(plain: Path, tmp_path: Path) -> None:
    report = export(plain, tmp_path, "bf16")
    report["files"]["tokenizer_config.json"]["sha256"] = "0" * 64
    (tmp_path / "export.json").write_text(json.dumps(report))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="tokenizer_config.json: differs from that of the finished export"):
        export(plain, tmp_path, "bf16")
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_a_finished_folder_is_left_clean(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the first run was killed before it removed its plan, or the export is asked for once more."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: kill())
        killed_child(lambda: export(plain, tmp_path, "bf16"))
    assert {".export.json", ".export.journal", ".lock"} < {path.name for path in tmp_path.iterdir()}
    for _ in range(2):
        export(plain, tmp_path, "bf16")
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_tokenizer_is_another_source(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    export(source, tmp_path / "out", "bf16")
    (source / "chat_template.jinja").write_text("{{ y }}")
    with pytest.raises(ValueError, match="holds another export, with another source"):
        export(source, tmp_path / "out", "bf16")


@pytest.mark.parametrize("format_", ["fp8", "int4", "int8", "nf4", "bnb-int8"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_not_quantized(tmp_path: Path, format_: str, number: float) -> None:
    """Codes would hide them: 4-bit floats have no NaN."""
    source = write_checkpoint(tmp_path / "source", torch.bfloat16, moe_intermediate_size=128, hidden_size=128)
    tensors = read_tensors(source)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][5, 7] = number
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = {"method": "mse"} if format_ == "int4" else {}
    with pytest.raises(ValueError, match=rf"{name}: found numbers that are not finite"):
        export(source, tmp_path / "out", format_, progress=False, **options)
    export(source, tmp_path / "plain", "bf16", progress=False)  # a copy keeps them
    assert not read_tensors(tmp_path / "plain")[name].isfinite().all()


def test_another_export_or_other_files_are_not_written_over(plain: Path, ragged: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "done", "bf16")
    for source, format_, options, differing in (
        (plain, "fp8", {}, "format, options"),
        (plain, "bf16", {"dtype": "fp16"}, "options"),
        (ragged, "bf16", {}, "source"),
        (plain, "bf16", {"max_shard_bytes": 10}, "max_shard_bytes"),
    ):
        with pytest.raises(ValueError, match=f"holds another export, with another {differing}; allowed is a folder"):
            export(source, tmp_path / "done", format_, **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"other: found thesis.txt, allowed is a folder that is new or empty"):
        export(plain, tmp_path / "other", "bf16")
    assert not (tmp_path / "other" / ".lock").exists() and not (tmp_path / "done" / ".lock").exists()
    (tmp_path / "other" / ".lock").write_text("of another program")
    with pytest.raises(ValueError, match=r"other: found thesis.txt, allowed is a folder that is new or empty"):
        export(plain, tmp_path / "other", "bf16")
    assert (tmp_path / "other" / ".lock").read_text() == "of another program"
    with pytest.raises(ValueError, match="which is the source; allowed is another folder"):
        export(plain, plain, "bf16")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_export_is_not_gone_on_from_another_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_config", lambda *arguments: kill())
        killed_child(lambda: export(source, tmp_path / "out", "bf16"))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"\.export\.json: holds another export, with another source"):
        export(source, tmp_path / "out", "bf16")


def test_an_option_that_does_not_fit_leaves_the_folder_free(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Source, options: Any) -> list[Step]:
        raise ValueError("does not fit")

    with monkeypatch.context() as patch:
        patch.setattr(fp8, "steps", refuse)
        with pytest.raises(ValueError, match="does not fit"):
            export(plain, tmp_path / "out", "fp8", power_of_two=True)
    assert not (tmp_path / "out").exists()
    export(plain, tmp_path / "out", "fp8")


def test_two_exports_to_one_folder_do_not_mix(plain: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another run"):
        export(plain, tmp_path, "bf16")


def test_every_tensor_is_consumed_once(plain: Path) -> None:
    source = Source(plain)
    steps = fp8.steps(source, fp8.Options())
    check_steps(source, steps, official=True)
    index = next(i for i, step in enumerate(steps) if step.quantized)
    step = steps[index]
    head = next(i for i, s in enumerate(steps) if s.inputs == ("lm_head.weight",))
    name = step.inputs[0]

    def broken(position: int, *given: Step) -> list[Step]:
        return [*steps[:position], *given, *steps[position + 1 :]]

    for wrong, message in (
        (broken(index), f"1 tensors not consumed: {name}"),
        (broken(index, step, replace(step, outputs=())), f"1 tensors consumed twice: {name}"),
        (broken(index, replace(step, inputs=(name, "x.y"))), "1 tensors not in the source: x.y"),
        (broken(index, replace(step, outputs=(*step.outputs, step.outputs[0]))), "1 tensors written twice"),
        (broken(index, replace(step, outputs=(Output("model.x", "F32", (1,)),))), "tensors not official: model.x"),
        (broken(index, replace(step, quantized=False)), "tensors not official"),
        (broken(head, replace(steps[head], outputs=steps[head].outputs[:1])), "1 tensors copies not written"),
        (broken(head, replace(steps[head], outputs=())), "tensors not official: lm_head.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            check_steps(source, wrong, official=True)


def test_unknown_formats_and_options_are_named(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: found 'awq', allowed are bf16, fp8, int4"):
        export(plain, tmp_path, "awq")
    with pytest.raises(ValueError, match="options: found group, allowed are power_of_two"):
        export(plain, tmp_path, "fp8", group=3)
    with pytest.raises(ValueError, match="max_shard_bytes: found 0"):
        export(plain, tmp_path, "bf16", max_shard_bytes=0)
    with pytest.raises(ValueError, match="source: found .*missing"):
        export(tmp_path / "missing", tmp_path / "out", "bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format_", "options", "message"),
    [
        ("bf16", {"dtype": ["bf16"]}, r"dtype: found \['bf16'\], allowed are bf16, fp16, fp32"),
        ("bf16", {"dtype": None}, "dtype: found None, allowed are bf16, fp16, fp32"),
        ("bf16", {"max_shard_bytes": "5GB"}, "max_shard_bytes: found '5GB', allowed is a whole number"),
        ("bf16", {"max_shard_bytes": True}, "max_shard_bytes: found True, allowed is a whole number"),
        ("bf16", {"progress": "no"}, "progress: found 'no', allowed are True and False"),
        ("fp8", {"power_of_two": 1}, "power_of_two: found 1, allowed are True and False"),
        ("int4", {"method": ["gptq"]}, r"method: found \['gptq'\], allowed are gptq, learned, mse, rtn"),
        ("int4", {"group_size": 128.0}, "group_size: found 128.0, allowed is a whole number"),
        ("int4", {"calibration": 5}, "calibration: found 5, allowed is a text"),
        ("int4", {"calibration_rows": "3"}, "calibration_rows: found '3', allowed is a whole number"),
        ("int4", {"seed": True}, "seed: found True, allowed is a whole number"),
        ("int8", {"targets": ["experts"]}, r"targets: found \['experts'\], allowed are experts, linears"),
        ("nf4", {"targets": {}}, "targets: found {}, allowed are experts, linears"),
        ("bnb-int8", {"targets": 3}, "targets: found 3, allowed are experts, linears"),
        ("gguf", {"quantization": ["Q8_0"]}, r"quantization: found \['Q8_0'\], allowed is a text"),
        ("gguf", {"mtp": "false"}, "mtp: found 'false', allowed are True and False"),
    ],
)
def test_options_of_another_type_are_named(
    plain: Path, tmp_path: Path, format_: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(plain, tmp_path / "out", format_, **options)
    assert not (tmp_path / "out").exists()


def test_arguments_of_export_are_no_options_of_a_format() -> None:
    """What the command line takes from its user to pass on by name."""
    for name in ("adapter", "progress", "max_shard_bytes", "source", "format"):
        with pytest.raises(ValueError, match=f"options: found {name}, allowed are dtype"):
            format_options("bf16", {name: "x"})
    with pytest.raises(ValueError, match="format: found 'awq', allowed are bf16, fp8"):
        format_options("awq", {})
    assert format_options("int4", {"method": "rtn"}).method == "rtn"


def test_the_report_says_what_is_on_the_disk(ragged: Path, tmp_path: Path) -> None:
    report = export(ragged, tmp_path, "fp8", max_shard_bytes=4 * SHARD)
    assert report == json.loads((tmp_path / "export.json").read_text())
    listed = {path.name for path in tmp_path.iterdir()} - {"export.json"}
    assert report["files"].keys() == listed
    for name, file in report["files"].items():
        data = (tmp_path / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    source = (ragged / "model.safetensors").read_bytes()
    assert report["source"]["files"] == {"model.safetensors": hashlib.sha256(source).hexdigest()}
    assert report["source"]["name"] == ragged.name and report["source"]["adapter"] is None
    count = num_parameters(Source(ragged).config)
    assert report["parameters"] == count.total + count.mtp
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert report["bytes"] == weights and report["bytes_per_parameter"] == weights / report["parameters"]
    tensors = read_tensors(tmp_path)
    assert report["tensors"]["written"] == len(tensors) and report["tensors"]["read"] == len(read_tensors(ragged)) - 2
    assert report["peak_memory_bytes"] > 2**20 and report["seconds"] >= 0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert str(ragged) not in json.dumps(report) and str(ragged) not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("format_", ["bf16", "fp8"])
def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, format_: str) -> None:
    config = tiny_config(hidden_size=512, moe_intermediate_size=512, n_routed_experts=24, num_hidden_layers=5)
    shapes = tensor_shapes(config, mtp=True)
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(tmp_path / "source")
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.2."))
    assert 5 * layer < sum(tensor.nbytes for tensor in tensors.values()) and layer > 35 * 2**20
    del tensors

    def measure() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again without a trace
        reset_peak_memory()
        before = peak_memory()
        export(tmp_path / "source", tmp_path / "out", format_, progress=False)
        (tmp_path / "peak").write_text(str(peak_memory() - before))

    in_child(measure)
    assert int((tmp_path / "peak").read_text()) < layer


def test_tokenizer_and_generation_settings_come_along(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path, "fp8")
    assert {name: (tmp_path / name).read_text() for name in TOKENIZER} == TOKENIZER
    assert (tmp_path / "generation_config.json").read_bytes() == (plain / "generation_config.json").read_bytes()
    assert config_json(tmp_path) == {
        **config_json(plain), "dtype": "bfloat16", "quantization_config": config_json(tmp_path)["quantization_config"]
    }  # fmt: skip


def test_every_chat_template_comes_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(source)
    report = export(source, tmp_path / "out", "bf16")
    name = "additional_chat_templates/tool_use.jinja"
    assert (tmp_path / "out" / name).read_text() == "{{ 2 }}" and name in report["files"]
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")  # transformers' own
    assert found.chat_template == tokenizer.chat_template


STOCK = """
import json, sys
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    quantization = config.to_dict().get("quantization_config") or {}
    found = type(config).__module__, config.num_hidden_layers, str(config.dtype), quantization.get("quant_method")
    tokenizer, generation = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    print(json.dumps([*found, tokenizer("some text")["input_ids"], tokenizer.chat_template, generation.temperature]))
assert not any(name.startswith("deepseek_v3") for name in sys.modules)
"""


def test_what_goes_along_is_read_back_by_us_and_by_stock_transformers(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", moe_intermediate_size=32)
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.save_pretrained(source)
    GenerationConfig(do_sample=True, temperature=0.6).save_pretrained(source)
    expected = DeepseekV3Config.from_pretrained(source).to_dict()
    methods = {"bf16": None, "fp8": "fp8", "int4": "compressed-tensors", "int8": "compressed-tensors"}
    methods |= {"nf4": "bitsandbytes", "bnb-int8": "bitsandbytes"}
    for format_ in methods:
        options = {"method": "rtn", "group_size": 32} if format_ == "int4" else {}
        export(source, tmp_path / format_, format_, progress=False, **options)
        config = DeepseekV3Config.from_pretrained(tmp_path / format_).to_dict()
        assert (config.pop("quantization_config", None) is None) == (format_ == "bf16")
        assert config == {**expected, "dtype": "bfloat16"}
        found = AutoTokenizer.from_pretrained(tmp_path / format_)
        assert type(found) is type(tokenizer) and found.get_vocab() == tokenizer.get_vocab()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / format_)
        assert model.generation_config.temperature == 0.6 and model.dtype == torch.bfloat16
    lines = run_python(STOCK, *(str(tmp_path / format_) for format_ in methods)).strip().splitlines()[-len(methods) :]
    for line, method in zip(lines, methods.values(), strict=True):
        module, layers, dtype, *rest = json.loads(line)
        assert module.startswith("transformers.") and layers == expected["num_hidden_layers"]
        assert dtype == "torch.bfloat16"
        assert rest == [method, tokenizer("some text")["input_ids"], tokenizer.chat_template, 0.6]


def test_progress_is_a_line_now_and_then_or_a_bar(
    ragged: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(ragged, tmp_path / "a", "bf16")
    assert capsys.readouterr() == ("", "")  # it took less than ten seconds
    monkeypatch.setattr(run, "SECONDS_PER_LINE", 0)
    export(ragged, tmp_path / "b", "bf16")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 100 and lines[-1].startswith("export: ")
    export(ragged, tmp_path / "c", "bf16", progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    export(ragged, tmp_path / "d", "bf16")
    assert "100%" in capsys.readouterr().err


def test_a_format_of_its_own_files_stands_alone(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["deepseek_v3.export.bf16"]

    def own(source: Source, steps: list[Step], options: Any) -> list[files.PlannedFile]:
        return [files.plan_file("model.gguf", b"head", steps, 32)]

    def finish(folder: Path, source: Source, options: Any) -> None:
        (folder / "model.gguf").write_bytes(b"made smaller")

    monkeypatch.setattr(module, "files", own, raising=False)
    monkeypatch.setattr(module, "finish", finish, raising=False)
    monkeypatch.setattr(module, "calibration", lambda source, options: {"text": "x"}, raising=False)
    report = export(plain, tmp_path, "bf16")
    digest = hashlib.sha256(b"made smaller").hexdigest()
    assert report["files"] == {"model.gguf": {"bytes": 12, "sha256": digest}} and report["bytes"] == 12
    assert report["calibration"] == {"text": "x"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "export.json"}
