"""Sources in every format we read, against tensors unpacked by hand, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForSequenceClassification, DeepseekV3Model
from deepseek_v3.export import Source, export
from tests.export.helpers import config_json, read_tensors, write_checkpoint
from tests.modeling_deepseek_v3.helpers import build, tiny_config

EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Replace the weights, and fields of the configuration."""
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config_json(folder), **config}))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One to be changed by a test."""
    return write_checkpoint(tmp_path / "source", torch.bfloat16)


def test_names_are_in_the_models_order_without_copies(plain: Path) -> None:
    source = Source(plain)
    assert source.names[0] == "model.embed_tokens.weight"
    assert source.names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in source.names if ".layers." in name]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}
    stored = read_tensors(plain)
    assert set(source.names) == stored.keys() - source.copies.keys()
    assert sorted(source.copies) == ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"]
    for name in source.names:
        assert source.shape(name) == stored[name].shape and source.dtype(name) == stored[name].dtype
        assert torch.equal(source.read(name), stored[name])
    assert isinstance(source.config, DeepseekV3Config) and source.quantization is None


def test_shards_are_read(tmp_path: Path) -> None:
    model = build(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    source, stored = Source(tmp_path), read_tensors(tmp_path)
    assert len(source.files) > 3 and all(torch.equal(source.read(name), stored[name]) for name in source.names)


def test_what_is_read_is_not_the_files_memory(plain: Path) -> None:
    source = Source(plain)
    tensor = source.read("model.norm.weight")
    tensor.zero_()
    assert source.read("model.norm.weight").abs().sum() > 0


def compressed(scheme: dict[str, Any], format_: str, inputs: dict[str, Any] | None) -> dict[str, Any]:
    """compressed-tensors' configuration of all routed experts."""
    group = {"targets": [r"re:.*mlp\.experts\..*_proj$"], "weights": scheme, "input_activations": inputs}
    group |= {"output_activations": None, "format": format_}
    return {
        "quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def test_int4_weights_are_unpacked(tmp_path: Path) -> None:
    """As compressed-tensors packs them: eight values of an int32, the lowest bits first, each plus 8."""
    folder = write_checkpoint(tmp_path, torch.bfloat16, moe_intermediate_size=64)
    tensors = read_tensors(folder)
    expected: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        rows, columns = tensors.pop(name).shape
        codes = torch.randint(-8, 8, (rows, columns), generator=generator)
        scale = torch.rand(rows, columns // 32, generator=generator).bfloat16()
        words = []
        for row in (codes + 8).tolist():
            for start in range(0, columns, 8):
                word = sum(value << (4 * i) for i, value in enumerate(row[start : start + 8]))
                words.append(word - 2**32 if word >= 2**31 else word)
        tensors[f"{name}_packed"] = torch.tensor(words, dtype=torch.int32).view(rows, columns // 8)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor([rows, columns])
        expected[name] = (codes.float() * scale.float().repeat_interleave(32, dim=1)).bfloat16()
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    quantization = compressed(scheme, "pack-quantized", None)
    source = Source(rewrite(folder, tensors, quantization_config=quantization))
    assert source.quantization == quantization and not hasattr(source.config, "quantization_config")
    assert len(expected) == 72
    for name, weight in expected.items():
        assert source.shape(name) == weight.shape and source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), weight), name
    assert torch.equal(source.read("model.norm.weight"), tensors["model.norm.weight"])

    broken = {**tensors, f"{EXPERT}.weight_shape": torch.tensor([5, 5])}
    with pytest.raises(ValueError, match=rf"{EXPERT}: weight_shape holds \[5, 5\]"):
        Source(rewrite(folder, broken)).read(f"{EXPERT}.weight")
    del broken[f"{EXPERT}.weight_scale"]
    with pytest.raises(ValueError, match=f"{EXPERT}.weight_scale"):
        Source(rewrite(folder, broken))


def test_int8_weights_are_multiplied_out(checkpoint: Path) -> None:
    tensors = read_tensors(checkpoint)
    expected: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        codes = torch.randint(-127, 128, tensors[name].shape, dtype=torch.int8)
        tensors[name], tensors[f"{name}_scale"] = codes, torch.rand(codes.shape[0], 1).bfloat16()
        expected[name] = (codes.float() * tensors[f"{name}_scale"].float()).bfloat16()
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    quantization = compressed(scheme, "int-quantized", inputs)
    source = Source(rewrite(checkpoint, tensors, quantization_config=quantization))
    for name, weight in expected.items():
        assert source.dtype(name) == torch.bfloat16 and torch.equal(source.read(name), weight)


def nf4_table() -> torch.Tensor:
    """The values of NF4 (arXiv 2305.14314, appendix E)."""
    return torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ])  # fmt: skip


def test_bitsandbytes_nf4_is_read(checkpoint: Path) -> None:
    """Packed by bitsandbytes itself, as it is saved; unpacked here with the table: high half first."""
    functional = pytest.importorskip("bitsandbytes").functional
    tensors, expected = read_tensors(checkpoint), {}
    for name in [name for name in tensors if ".mlp.experts." in name or name.endswith("o_proj.weight")]:
        weight = tensors.pop(name).float()
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        state.dtype = torch.bfloat16
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten().long()
        values = nf4_table()[codes].view(-1, 64) * state.absmax[:, None]
        expected[name] = values.view(weight.shape).bfloat16()
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    quantization |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    quantization |= {"bnb_4bit_quant_storage": "uint8"}
    source = Source(rewrite(checkpoint, tensors, quantization_config=quantization))
    for name, weight in expected.items():
        assert source.dtype(name) == torch.bfloat16 and torch.equal(source.read(name), weight), name


def test_bitsandbytes_int8_is_read(checkpoint: Path) -> None:
    tensors, expected = read_tensors(checkpoint), {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        codes = torch.randint(-127, 128, tensors[name].shape, dtype=torch.int8)
        module = name.removesuffix(".weight")
        tensors[name], tensors[f"{module}.SCB"] = codes, torch.rand(codes.shape[0])
        tensors[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        expected[name] = codes.double() * tensors[f"{module}.SCB"].double()[:, None] / 127
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
    source = Source(rewrite(checkpoint, tensors, quantization_config=quantization))
    for name, weight in expected.items():
        assert torch.allclose(source.read(name).double(), weight, rtol=2**-8, atol=0), name


def test_a_tensor_without_a_place_is_an_error(checkpoint: Path) -> None:
    tensors = read_tensors(checkpoint)
    for name, config in (
        ("model.layers.9.enorm.weight", {}),
        ("score.weight", {}),
        ("model.layers.4.hnorm.weight", {"num_nextn_predict_layers": 1}),
    ):
        rewrite(checkpoint, {**tensors, name: torch.zeros(64)}, **config)
        with pytest.raises(ValueError, match=f"{name}"):
            Source(checkpoint)
    rewrite(checkpoint, tensors, num_nextn_predict_layers=0)  # an MTP layer that the configuration denies
    with pytest.raises(ValueError, match=r"44 tensors that the configuration has no place for: model\.layers\.3\."):
        Source(checkpoint)


def test_a_missing_tensor_and_a_wrong_shape_are_errors(checkpoint: Path) -> None:
    tensors = read_tensors(checkpoint)
    for name, change in (("lm_head.weight", None), (f"{EXPERT}.weight", torch.zeros(2, 2))):
        changed = {**tensors, name: change} if change is not None else {n: t for n, t in tensors.items() if n != name}
        with pytest.raises(ValueError, match=name):
            Source(rewrite(checkpoint, changed))


def test_a_copy_that_differs_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    tensors = read_tensors(checkpoint)
    name = "model.layers.3.shared_head.head.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][5, 5] += 1
    rewrite(checkpoint, tensors)
    with pytest.raises(ValueError, match=f"{name} differs from lm_head.weight, which it should repeat"):
        export(checkpoint, tmp_path / "out", "bf16")
    del tensors[name]  # older files have no copies; they are written all the same
    export(rewrite(checkpoint, tensors), tmp_path / "other", "bf16")
    assert torch.equal(read_tensors(tmp_path / "other")[name], tensors["lm_head.weight"])


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    tensors = read_tensors(folder)
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    export(rewrite(folder, same), tmp_path / "a", "bf16")
    assert "lm_head.weight" not in read_tensors(tmp_path / "a")
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        export(rewrite(folder, {**same, "lm_head.weight": same["lm_head.weight"] + 1}), tmp_path / "b", "bf16")


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    build(tiny_config(), DeepseekV3Model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"architectures is \['DeepseekV3Model'\], allowed is one of DeepseekV3F"):
        Source(tmp_path)


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({"quant_method": "awq"}, "quant_method is 'awq', allowed are fp8, compressed-tensors, bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": ["fp8"]}, "quant_method"),
    ],
)
def test_an_unknown_quantization_is_named(checkpoint: Path, quantization: dict, message: str) -> None:
    rewrite(checkpoint, read_tensors(checkpoint), quantization_config=quantization)
    with pytest.raises(ValueError, match=message):
        Source(checkpoint)


def test_a_file_that_shrinks_while_it_is_read_is_named(checkpoint: Path) -> None:
    source = Source(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors: ends before byte \d+, inside a tensor"):
        for name in source.names:
            source.read(name)


def test_a_source_without_a_tokenizer_says_so(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert Source(checkpoint).notes == []
    (checkpoint / "tokenizer.json").unlink()
    said = f"{checkpoint}: found no tokenizer.json"
    assert Source(checkpoint).notes == [f"{said}: none goes along"]
    (checkpoint / "tiktoken.model").touch()
    export(checkpoint, tmp_path / "out", "bf16", progress=False)
    remedy = "deepseek_v3.tokenization.convert_tiktoken makes one of tiktoken.model"
    assert capsys.readouterr().out == f"{said} ({remedy}): none goes along\n"


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*config.json"):
        Source(tmp_path)


@pytest.mark.parametrize("architectures", ["DeepseekV3ForCausalLM", 3, [None], ["LlamaForCausalLM"], {"a": 1}])
def test_architectures_that_are_none_of_ours_are_refused(checkpoint: Path, architectures: Any) -> None:
    rewrite(checkpoint, read_tensors(checkpoint), architectures=architectures)
    with pytest.raises(ValueError, match="architectures"):
        Source(checkpoint)


@pytest.mark.parametrize("score", [None, torch.zeros(3, 63), torch.zeros(64)])
def test_a_classifier_needs_its_head(tmp_path: Path, score: torch.Tensor | None) -> None:
    folder = write_checkpoint(tmp_path, cls=DeepseekV3ForSequenceClassification)
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name != "score.weight"}
    rewrite(folder, tensors if score is None else {**tensors, "score.weight": score})
    with pytest.raises(ValueError, match=r"found (no )?score.weight.*, allowed is \[labels, 64\]"):
        Source(folder)
