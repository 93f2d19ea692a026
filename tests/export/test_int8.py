from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_v3.export import Source, export
from tests.clients.environments import run_client
from tests.export.helpers import config_json, read_tensors, write_checkpoint
from tests.export.test_int4 import KV_B, LINEAR, MTP, checkpoint, targeted  # noqa: F401


@pytest.mark.parametrize("targets", ["linears", "experts"])
def test_layout(checkpoint: Path, tmp_path: Path, targets: str) -> None:  # noqa: F811
    export(checkpoint, tmp_path / "out", "int8", progress=False, targets=targets)
    original, written = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    source = Source(tmp_path / "out")
    for name, weight in original.items():
        found = written.pop(name)
        if not targeted(name, targets):
            assert torch.equal(found, weight)
            continue
        scale = written.pop(f"{name}_scale")
        assert found.dtype == torch.int8 and found.shape == weight.shape and found.abs().max() == 127
        assert scale.dtype == torch.bfloat16 and scale.shape == (len(weight), 1)
        exact = found.numpy().astype(np.float64) * scale.double().numpy()
        step = weight.double().abs().amax(1, keepdim=True).numpy() / 127
        assert (np.abs(exact - weight.double().numpy()) / step).max() < 0.5 + 127 * 2**-8  # codes, and the bf16 scale
        assert torch.equal(source.read(name), torch.from_numpy(exact).to(torch.bfloat16))
    assert not written


@pytest.mark.parametrize("targets", ["linears", "experts"])
def test_config(checkpoint: Path, tmp_path: Path, targets: str) -> None:  # noqa: F811
    export(checkpoint, tmp_path / "out", "int8", progress=False, targets=targets)
    config = config_json(tmp_path / "out")["quantization_config"]
    ignore = config.pop("ignore")
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "output_activations": None,
                "format": "int-quantized",
                "weights": {
                    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
                },
            }
        },
    }  # fmt: skip
    assert {"lm_head", "model.layers.1.mlp.gate", r"re:model\.layers\.2\..*"} <= set(ignore)
    for name in read_tensors(checkpoint):
        if name.endswith(LINEAR) and not name.startswith(MTP):
            assert (name.removesuffix(".weight") in ignore) != targeted(name, targets)
    assert sum(KV_B in f"{name}." for name in ignore) == 2


@pytest.mark.parametrize("overrides", [{"tie_word_embeddings": True}, {}])
def test_the_head_is_ignored_whether_a_tensor_or_not(tmp_path: Path, overrides: dict) -> None:
    """A tied one is no tensor of the file, but a linear layer of transformers' model."""
    write_checkpoint(tmp_path / "source", **overrides)
    export(tmp_path / "source", tmp_path / "out", "int8", progress=False)
    assert config_json(tmp_path / "out")["quantization_config"]["ignore"].count("lm_head") == 1
    assert ("lm_head.weight" in read_tensors(tmp_path / "out")) != bool(overrides)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_merged_layers_have_one_scheme(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    """Servers merge q_a_proj with kv_a_proj_with_mqa and gate_proj with up_proj."""
    for targets in ("linears", "experts"):
        export(checkpoint, tmp_path / targets, "int8", progress=False, targets=targets)
        dtypes = {name: tensor.dtype for name, tensor in read_tensors(tmp_path / targets).items()}
        for name, dtype in dtypes.items():
            for one, other in (("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")):
                assert dtype == dtypes[name.replace(f".{one}.", f".{other}.")]


def test_unknown_targets(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="targets: found 'gate', allowed are experts, linears"):
        export(checkpoint, tmp_path / "out", "int8", targets="gate")


@pytest.mark.slow
def test_compressed_tensors_reads_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    folder, result = tmp_path / "out", tmp_path / "weights"
    export(checkpoint, folder, "int8", progress=False)
    script = Path(__file__).with_name("compressed_tensors_client.py")
    run_client("compressed-tensors", script, str(folder), str(result))
    source, found = Source(folder), load_file(result)
    assert set(found) == {name for name in read_tensors(checkpoint) if targeted(name, "linears")}
    for name, weight in found.items():
        assert torch.equal(weight, source.read(name)), name
