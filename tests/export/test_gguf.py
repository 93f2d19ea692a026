"""GGUF files against the gguf library: names, shapes, types and values of the tensors, and the way back."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

import deepseek_v3.export.gguf_quantize as gguf_quantize
from deepseek_v3 import DeepseekV3ForSequenceClassification
from deepseek_v3.configuration.parameters import num_parameters
from deepseek_v3.export import Source, export
from deepseek_v3.export.gguf import read_gguf
from tests.export.gguf_models import ROWS, export_gguf, make_tokenizer, save_model
from tests.modeling_deepseek_v3.helpers import YARN, build, tiny_config

# kinds of models that take other paths
MODELS = {
    "latent query, groups": {},
    "direct query, one group": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "tied, without MTP": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
    "two MTP layers, all dense": {"num_nextn_predict_layers": 2, "first_k_dense_replace": 9},
    "yarn": {"rope_parameters": YARN},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_every_official_tensor_comes_back_from_an_f32_file(overrides: dict, tmp_path: Path) -> None:
    source = Source(save_model(tmp_path / "tiny", **overrides))
    found = read_gguf(export_gguf(source.folder, tmp_path / "out", "F32"))
    assert found.names == source.names
    for name in source.names:
        assert found.shape(name) == source.shape(name)
        torch.testing.assert_close(found.read(name), source.read(name).float(), rtol=0, atol=0)


def test_names_and_shapes_are_those_of_the_library(base: Path, tmp_path: Path) -> None:
    source = Source(base)
    blocks = source.config.num_hidden_layers + source.config.num_nextn_predict_layers
    official = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, blocks)
    # this version's deepseek2 has no MTP names; llama.cpp's are those of GLM
    official.mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, blocks).mapping | official.mapping
    expected = {}
    for name in source.names:
        if ".kv_b_proj" in name:
            halves = [name.replace("kv_b_proj", half) for half in ("k_b_proj", "v_b_proj")]
            expected |= {official.get_name(half, (".weight",)): None for half in halves}
        elif ".experts." in name:
            before, after = name.split(".experts.")
            stacked = f"{before}.experts.{after.split('.', 1)[1]}"
            shape = (source.config.n_routed_experts, *source.shape(name))
            expected[official.get_name(stacked, (".weight",))] = shape
        elif name.endswith("e_score_correction_bias"):
            expected[official.get_name(name.removesuffix("_bias")) + ".bias"] = source.shape(name)
        else:
            expected[official.get_name(name, (".weight",))] = source.shape(name)
    tensors = GGUFReader(export_gguf(base, tmp_path, "F32")).tensors
    found = {tensor.name: tuple(tensor.data.shape) for tensor in tensors}
    assert found.keys() == expected.keys()
    assert {name: shape for name, shape in found.items() if expected[name]} == {k: v for k, v in expected.items() if v}


def test_the_halves_of_kv_b_absorb_as_in_the_reference(base: Path, tmp_path: Path) -> None:
    """q^T (W_k c) = (W_k^T q)^T c: DeepSeek's `inference/model.py` absorbs with the same einsums."""
    source = Source(base)
    config = source.config
    tensors = {t.name: torch.tensor(t.data) for t in GGUFReader(export_gguf(base, tmp_path, "F32")).tensors}
    weight = source.read("model.layers.0.self_attn.kv_b_proj.weight").float()
    per_head = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    query, latent = torch.randn(config.num_attention_heads, config.qk_nope_head_dim), torch.randn(config.kv_lora_rank)
    absorbed = torch.einsum("hd,hdc->hc", query, per_head[:, : config.qk_nope_head_dim])
    torch.testing.assert_close(torch.einsum("hcd,hd->hc", tensors["blk.0.attn_k_b.weight"], query), absorbed)
    values = torch.einsum("c,hdc->hd", latent, per_head[:, -config.v_head_dim :])
    torch.testing.assert_close(torch.einsum("c,hdc->hd", latent, tensors["blk.0.attn_v_b.weight"]), values)


# Half a step of the grid relative to the root mean square of a block of normal numbers is about these
ERRORS = {"F32": 0.0, "F16": 5e-4, "BF16": 3e-3, "Q8_0": 8e-3, "Q5_0": 0.05, "Q4_0": 0.11}


@pytest.mark.parametrize("quantization", ERRORS)
def test_values_are_those_that_the_library_dequantizes(quantization: str, base: Path, tmp_path: Path) -> None:
    source, file = Source(base), export_gguf(base, tmp_path, quantization)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name in ("token_embd", "output", "blk.1.attn_q_a", "blk.1.ffn_down_exps", "blk.3.nextn.eh_proj"):
        tensor = tensors[f"{name}.weight"]
        wanted = "Q8_0" if name == "output" and quantization[0] == "Q" else quantization
        assert tensor.tensor_type.name == wanted
    for name in ("blk.1.attn_norm.weight", "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias"):
        assert tensors[name].tensor_type.name == "F32"

    found = read_gguf(file)
    library = tensors["blk.1.ffn_up_exps.weight"]
    values = gguf.dequantize(library.data, library.tensor_type)
    for expert in range(source.config.n_routed_experts):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        np.testing.assert_array_equal(found.read(name).float().numpy(), values[expert])
        original = source.read(name).float()
        error = (found.read(name).float() - original).norm() / original.norm()
        assert ERRORS[quantization] / 3 <= error <= ERRORS[quantization]


def test_a_bf16_checkpoint_is_unchanged_in_a_bf16_file(tmp_path: Path) -> None:
    source = Source(save_model(tmp_path / "tiny", torch.bfloat16))
    found = read_gguf(export_gguf(source.folder, tmp_path / "out", "BF16"))
    assert {found.dtype(name) for name in found.names} == {torch.float32, torch.bfloat16}
    for name in source.names:
        torch.testing.assert_close(found.read(name).float(), source.read(name).float(), rtol=0, atol=0)


def test_rows_that_fit_no_block_are_f16(tmp_path: Path) -> None:
    file = export_gguf(save_model(tmp_path / "tiny", moe_intermediate_size=24), tmp_path / "out", "Q4_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert kinds["blk.1.ffn_down_exps.weight"] == GGMLQuantizationType.F16  # rows of 24
    assert kinds["blk.1.ffn_up_exps.weight"] == GGMLQuantizationType.Q4_0  # rows of 64


@pytest.mark.parametrize(
    ("name", "shape", "quantization", "expected"),
    [
        ("blk.5.ffn_up_exps.weight", (8, 512, 256), "Q4_K_M", "Q4_K"),
        ("blk.0.ffn_down.weight", (256, 512), "Q4_K_M", "Q6_K"),  # of the first eighth of 16 layers
        ("blk.3.ffn_down_exps.weight", (8, 256, 512), "Q4_K_M", "Q4_K"),
        ("blk.4.ffn_down_exps.weight", (8, 256, 512), "Q4_K_M", "Q6_K"),  # the third layer after it
        ("blk.15.ffn_down_exps.weight", (8, 256, 512), "Q4_K_M", "Q6_K"),
        ("blk.5.attn_k_b.weight", (4, 512, 128), "Q4_K_M", "Q8_0"),
        ("output.weight", (1000, 256), "Q4_K_M", "Q6_K"),
        ("token_embd.weight", (1000, 256), "Q4_K_M", "Q4_K"),
        ("blk.5.attn_q_a.weight", (96, 320), "Q4_K_M", "Q5_0"),  # rows of 320: no multiple of 256
        ("output.weight", (1000, 320), "Q6_K", "Q8_0"),
        ("blk.5.attn_q_b.weight", (64, 48), "Q6_K", "F16"),
        ("blk.5.ffn_gate_inp.weight", (8, 256), "Q6_K", "F32"),
    ],
)
def test_types_of_k_quants(name: str, shape: tuple, quantization: str, expected: str) -> None:
    assert gguf_quantize.tensor_type(name, shape, quantization, blocks=16, tied=False).name == expected


def test_a_tied_embedding_is_quantized_as_the_head() -> None:
    kind = gguf_quantize.tensor_type("token_embd.weight", (1000, 256), "Q4_0", blocks=16, tied=True)
    assert kind == GGMLQuantizationType.Q8_0


def test_k_quants_say_what_to_install(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_quantize.ggml_library.cache_clear()
    monkeypatch.setattr(gguf_quantize, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf_quantize.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ValueError, match="Q4_K_M need llama.cpp's quantizer.*pip install xllamacpp"):
        export_gguf(save_model(tmp_path / "wide", hidden_size=256), tmp_path / "out", "Q4_K_M")


def test_the_report_counts_what_is_quantized(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "tiny")
    (tmp_path / "tiny" / "LICENSE").write_text("MIT")
    report = export(tmp_path / "tiny", tmp_path / "out", "gguf", quantization="Q8_0", progress=False)
    assert report["files"].keys() == {"tiny-Q8_0.gguf", "LICENSE"}
    assert 0.98 < report["quantized"]["share"] < 1  # all but norms and routers
    assert 34 / 32 < report["bytes_per_parameter"] < 1.3  # the rest is the tokenizer
    source = Source(base)
    counted = [source.read(name).numel() for name in source.names if not name.endswith("e_score_correction_bias")]
    assert report["parameters"] == sum(counted)


def test_a_file_without_mtp_layers(base: Path, tmp_path: Path) -> None:
    found = read_gguf(export_gguf(base, tmp_path, "F32", mtp=False))
    assert found.config.num_nextn_predict_layers == 0
    assert found.names == [name for name in Source(base).names if not name.startswith("model.layers.3.")]
    assert not any(name.startswith("blk.3.") for name in (t.name for t in GGUFReader(found.path).tensors))
    report = json.loads((tmp_path / "export.json").read_text())
    count = num_parameters(found.config)
    assert count.mtp == 0 and report["parameters"] == count.total  # those that its bytes are for
    assert report["bytes_per_parameter"] == found.path.stat().st_size / count.total > 4
    left_out = [name for name in Source(base).names if name.startswith("model.layers.3.")]
    assert report["tensors"]["dropped"] == len(left_out) and report["tensors"]["read"] == len(found.names)


def test_without_the_gguf_library_it_says_what_to_install(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "deepseek_v3.export.gguf")
    with pytest.raises(ValueError, match="format: gguf needs a library that is not installed: pip install gguf"):
        export_gguf(base, tmp_path / "out", "F32")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export_gguf(base, tmp_path / "whole", "Q8_0").read_bytes()
    read, left = Source.read, [60]

    def read_sixty(self: Source, name: str) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("interrupted")
        return read(self, name)

    monkeypatch.setattr(Source, "read", read_sixty)
    with pytest.raises(OSError, match="interrupted"):
        export_gguf(base, tmp_path / "part", "Q8_0")
    left[0] = len(Source(base).names) - 60  # those that are not written yet; one more would be an error
    assert export_gguf(base, tmp_path / "part", "Q8_0").read_bytes() == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"rope_interleave": False}, "rope_interleave: found False"),
        ({"num_hidden_layers": 25}, "num_hidden_layers: found 26 with its 1 MTP layers"),
        ({"num_hidden_layers": 27, "num_nextn_predict_layers": 0}, "num_hidden_layers: found 27"),
        ({"rope_parameters": {**YARN, "rope_type": "dynamic"}}, r"rope_parameters\['rope_type'\]: found 'dynamic'"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(overrides: dict, message: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", hidden_size=32, n_routed_experts=4, n_group=1, topk_group=1, **overrides)
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, tmp_path / "out", "F32")


def test_27_layers_without_query_latent_are_fine(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    folder = save_model(tmp_path / "tiny", num_hidden_layers=26, q_lora_rank=None, **sizes)
    assert read_gguf(export_gguf(folder, tmp_path / "out", "BF16")).config.num_hidden_layers == 26


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    build(tiny_config(), DeepseekV3ForSequenceClassification).save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="no lm_head.weight, allowed in GGUF are causal models"):
        export_gguf(tmp_path / "tiny", tmp_path / "out", "F32")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    build(tiny_config()).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="found no tokenizer.json, which a GGUF file has to hold"):
        export_gguf(tmp_path / "tiny", tmp_path / "out", "F32")


def test_a_number_too_large_for_f16_is_refused(tmp_path: Path) -> None:
    model = build(tiny_config(vocab_size=ROWS))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight: found 1e.05, too large"):
        export_gguf(tmp_path / "tiny", tmp_path / "out", "F16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight: found numbers that are not finite"):
        export_gguf(tmp_path / "tiny", tmp_path / "other", "Q8_0")


def test_an_unknown_quantization_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization: found 'Q3_K', allowed are BF16, F32, F16, Q8_0"):
        export_gguf(base, tmp_path, "Q3_K")
