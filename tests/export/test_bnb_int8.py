"""LLM.int8() files against bitsandbytes' own functions, read back by us and, in part, by stock transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from deepseek_v3.export import Source, export
from tests.export.helpers import config_json, read_tensors
from tests.export.test_nf4 import check_use, stock_result, targeted, whole  # noqa: F401


@pytest.mark.parametrize("targets", ["linears", "experts"])
def test_files_hold_what_bitsandbytes_makes(ragged: Path, tmp_path: Path, targets: str) -> None:
    report = export(ragged, tmp_path / "out", "bnb-int8", progress=False, targets=targets)
    original, written = read_tensors(ragged), read_tensors(tmp_path / "out")
    source, quantized = Source(tmp_path / "out"), 0
    assert source.names == Source(ragged).names
    for name, weight in original.items():
        found = written.pop(name)
        if not targeted(name, targets):
            assert found.dtype == weight.dtype and torch.equal(found, weight), name
            continue
        module = name.removesuffix(".weight")
        largest, layout = written.pop(f"{module}.SCB"), written.pop(f"{module}.weight_format")
        codes, expected, _ = functional.int8_vectorwise_quant(weight.half())
        assert found.dtype == torch.int8 and torch.equal(found, codes)
        assert largest.dtype == torch.float32 and torch.equal(largest, expected)
        assert layout.dtype == torch.uint8 and layout.shape == () and layout == 0
        meant = functional.int8_vectorwise_dequant(found, largest)
        assert torch.equal(source.read(name), meant.bfloat16())
        assert ((meant - weight.float()).abs() <= 0.51 * largest[:, None] / 127).all()
        quantized += weight.numel() + 4 * len(weight) + 1
    assert not written
    assert report["quantized"]["bytes"] == quantized


def test_config(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    export(whole, tmp_path / "out", "bnb-int8", progress=False)
    config = config_json(tmp_path / "out")["quantization_config"]
    skipped = ["lm_head", "model.layers.2.eh_proj"]
    assert BitsAndBytesConfig.from_dict(config).to_dict() == config
    assert config == {**BitsAndBytesConfig(load_in_8bit=True).to_dict(), "llm_int8_skip_modules": skipped}
    assert config["quant_method"] == "bitsandbytes" and config["load_in_8bit"] and not config["load_in_4bit"]


def test_use(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    export(whole, tmp_path / "out", "bnb-int8", progress=False)
    check_use(whole, tmp_path / "out", tmp_path, 1)


def changed(whole: Path, folder: Path, name: str, row: float) -> Path:  # noqa: F811
    """A copy of the checkpoint with a row of this value in a weight."""
    tensors = read_tensors(whole)
    tensors[name][3] = row
    shutil.copytree(whole, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_row_of_zeros(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    folder = changed(whole, tmp_path / "plain", name, 0)
    export(folder, tmp_path / "out", "bnb-int8", progress=False)
    weight = Source(tmp_path / "out").read(name)
    assert not weight[3].any() and weight[4].any() and weight.isfinite().all()


def test_a_weight_that_fp16_cannot_hold(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    name = "model.layers.0.self_attn.o_proj.weight"
    folder = changed(whole, tmp_path / "plain", name, 1e5)
    with pytest.raises(ValueError, match=f"{name}: found 9.98e.04, too large for torch.float16"):
        export(folder, tmp_path / "out", "bnb-int8", progress=False)


def test_stock_transformers_reads_all_but_the_routed_experts(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    """It stacks the experts' codes without their scales, and stops at the first product with them; on CPUs it already
    stops at kv_b_proj, whose input has four dimensions there."""
    export(whole, tmp_path / "int8", "bnb-int8", progress=False)
    export(tmp_path / "int8", tmp_path / "bf16", "bf16", progress=False)
    linears, error, message = stock_result(
        tmp_path / "int8", tmp_path / "mixed", "Linear8bitLt", tmp_path / "bf16", (".experts.", ".kv_b_proj.")
    )
    assert int(linears) == 2 * 4 + 3 + 3 and float(error) < 0.05
    assert "must match the size" in message


def test_unknown_targets(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="targets: found 'gate', allowed are experts, linears"):
        export(whole, tmp_path / "out", "bnb-int8", targets="gate")
