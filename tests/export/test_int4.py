import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.export import Source, export, learned_scales
from deepseek_v3.export.calibration import Calibration, calibration_rows
from deepseek_v3.kernels.int4 import pack_int4, quantize_int4
from deepseek_v3.tokenization import train_tokenizer
from tests.clients.environments import run_client
from tests.export.helpers import config_json, read_tensors, write_checkpoint
from tests.modeling_deepseek_v3.helpers import build, relative_error, tiny_config, tokens

# one dense, one MoE and one MTP layer; every input is a multiple of 32
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
SIZES |= {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8}
CALIBRATION = {"calibration_rows": 6, "calibration_length": 32}
WORDS = "def return import class the a of self x y 0 1 = ( ) : ."
KV_B, MTP = ".self_attn.kv_b_proj.", "model.layers.2."
LINEAR = ("_proj.weight", "_proj_with_mqa.weight")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, with a tokenizer and a corpus beside it."""
    folder = tmp_path_factory.mktemp("int4")
    build(tiny_config(**SIZES, vocab_size=400)).to(torch.bfloat16).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS.split(), 300)) for _ in range(30)]
    (folder / "corpus").mkdir()
    for i, text in enumerate(texts):
        (folder / "corpus" / f"{i}.txt").write_text(text)
    train_tokenizer(texts[:3], 380).save_pretrained(folder / "model")
    return folder / "model"


def run(checkpoint: Path, output: Path, **options) -> Path:
    if options.get("method", "gptq") in ("gptq", "learned"):
        options = {**CALIBRATION, "calibration": str(checkpoint.parent / "corpus"), **options}
    export(checkpoint, output, "int4", progress=False, **{"group_size": 32, **options})
    return output


def unpacked(packed: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The weight by the layout's definition, in numpy: element i is in bits 4 (i mod 8) of word i // 8, plus 8."""
    words = packed.numpy().view(np.uint32)
    codes = np.stack([(words >> 4 * i) & 15 for i in range(8)], axis=-1).reshape(len(words), -1).astype(np.float64) - 8
    return codes * scale.double().numpy().repeat(codes.shape[1] // scale.shape[1], axis=1)


def targeted(name: str, targets: str) -> bool:
    if not name.endswith(LINEAR) or name.startswith(MTP):
        return False
    return ".experts." in name or (targets == "linears" and KV_B not in name)


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq", "learned"])
@pytest.mark.parametrize("targets", ["experts", "linears"])
def test_layout(checkpoint: Path, tmp_path: Path, method: str, targets: str, monkeypatch) -> None:
    monkeypatch.setattr(learned_scales, "STEPS", 2)
    run(checkpoint, tmp_path / "out", method=method, targets=targets)
    original, written = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    source = Source(tmp_path / "out")
    for name, weight in original.items():
        if not targeted(name, targets):
            assert torch.equal(written.pop(name), weight)
            continue
        packed, scale, shape = (written.pop(f"{name}_{part}") for part in ("packed", "scale", "shape"))
        rows, columns = weight.shape
        assert packed.dtype == torch.int32 and packed.shape == (rows, columns // 8)
        assert scale.dtype == torch.bfloat16 and scale.shape == (rows, columns // 32) and (scale > 0).all()
        assert shape.dtype == torch.int64 and shape.tolist() == [rows, columns]
        values = torch.from_numpy(unpacked(packed, scale))
        assert relative_error(values, weight) < 0.4
        assert torch.equal(source.read(name), values.to(torch.bfloat16))
    assert not written


def test_rounding_to_nearest_is_the_kernels(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "out", method="rtn")
    original, written = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    for name in original:
        if targeted(name, "experts"):
            packed, scale = quantize_int4(original[name], 32)
            assert torch.equal(written[f"{name}_packed"], packed) and torch.equal(written[f"{name}_scale"], scale)


def test_pack() -> None:
    codes = torch.arange(-8, 8).repeat(3, 4)[:, torch.randperm(64)]
    scale = torch.ones(3, 2)
    assert np.array_equal(unpacked(pack_int4(codes), scale), codes.numpy())
    assert torch.equal(pack_int4(codes.float()), pack_int4(codes.to(torch.int8)))


def test_gptq_keeps_the_output_on_the_text(checkpoint: Path, tmp_path: Path) -> None:
    """The last layer's output, with the exports' weights as they are, against the original's."""
    corpus = str(checkpoint.parent / "corpus")
    rows, record = calibration_rows(checkpoint, corpus, 6, 32, 0)
    outputs = {}
    for method in ("exact", "rtn", "gptq"):
        folder = checkpoint if method == "exact" else run(checkpoint, tmp_path / method, method=method)
        walk = Calibration(Source(folder), rows, [], lambda moment: pytest.fail("nothing is to be quantized"))
        outputs[method] = [walk.advance().clone() for _ in range(SIZES["num_hidden_layers"])][-1]
    error = {method: (output - outputs["exact"]).square().mean() for method, output in outputs.items()}
    assert 0 < error["gptq"] < 0.5 * error["rtn"]

    report = json.loads((tmp_path / "gptq" / "export.json").read_text())
    assert report["calibration"] == {**record, "text": "corpus"} and record["text"] == corpus
    assert report["options"]["calibration"] == "corpus" and corpus not in json.dumps(report)
    assert json.loads((tmp_path / "rtn" / "export.json").read_text())["calibration"] is None


@pytest.mark.parametrize("targets", ["experts", "linears"])
def test_config(checkpoint: Path, tmp_path: Path, targets: str) -> None:
    run(checkpoint, tmp_path / "out", method="rtn", targets=targets)
    config = config_json(tmp_path / "out")
    assert config["dtype"] == "bfloat16" and config["scoring_func"] == "sigmoid"
    quantization = config["quantization_config"]
    ignore = quantization.pop("ignore")
    assert quantization == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                    "dynamic": False, "actorder": None,
                },
            }
        },
    }  # fmt: skip
    linears = {
        name.removesuffix(".weight")
        for name in read_tensors(checkpoint)
        if name.endswith(LINEAR) and not name.startswith(MTP) and not targeted(name, targets)
    }
    assert set(ignore) == {"lm_head", "model.layers.1.mlp.gate", r"re:model\.layers\.2\..*"} | linears
    assert any("kv_b_proj" in name for name in linears)


def test_bytes(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", "int4", progress=False, method="rtn", group_size=32)
    quantized = json.loads((tmp_path / "out" / "export.json").read_text())["quantized"]
    weights = sum(w.numel() for name, w in read_tensors(checkpoint).items() if targeted(name, "experts"))
    assert quantized["parameters"] == weights
    assert quantized["bytes_in_bf16"] == 2 * weights
    matrices = 3 * SIZES["n_routed_experts"]
    assert quantized["bytes"] == weights * (4 + 16 / 32) / 8 + 16 * matrices


def test_calibrated_exports_depend_on_the_seed_alone(checkpoint: Path, tmp_path: Path) -> None:
    folders = [run(checkpoint, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == same != other


def test_other_calibration_text_is_another_export(checkpoint: Path, tmp_path: Path) -> None:
    """Text of the same name counts by its hash: an interrupted export would mix the weights of two."""
    folder, corpus = run(checkpoint, tmp_path / "out"), tmp_path / "corpus"
    shutil.copytree(checkpoint.parent / "corpus", corpus)
    run(checkpoint, folder, calibration=str(corpus))  # the same text elsewhere
    (corpus / "0.txt").write_text(" ".join(WORDS.split() * 20))
    with pytest.raises(ValueError, match="holds another export, with another calibration;"):
        run(checkpoint, folder, calibration=str(corpus))


def test_the_tokenizer_of_an_adapter_reads_the_text(checkpoint: Path, tmp_path: Path) -> None:
    """A base may have none."""
    shutil.copytree(checkpoint, tmp_path / "base")
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.rename(tmp_path / "adapter" / file.name)
    corpus = str(checkpoint.parent / "corpus")
    options = {**CALIBRATION, "calibration": corpus, "group_size": 32}
    report = export(tmp_path / "base", tmp_path / "out", "int4", adapter=tmp_path / "adapter", **options)
    assert report["calibration"]["rows"] == 6 and "tokenizer.json" in report["files"]


@pytest.mark.parametrize(
    ("targets", "size", "message"),
    [
        ("experts", 64, r"model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight has 96 inputs; allowed are 32$"),
        # its 64 inputs would allow 64, but other weights have 32 and 96
        ("linears", 128, r"model\.layers\.0\.self_attn\.q_a_proj\.weight has 64 inputs; allowed are 32$"),
    ],
)
def test_group_that_does_not_divide_the_inputs(
    checkpoint: Path, tmp_path: Path, targets: str, size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"group_size: found {size}, but {message}"):
        run(checkpoint, tmp_path / "out", method="rtn", group_size=size, targets=targets)


def test_inputs_that_no_group_size_divides(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "odd", moe_intermediate_size=40)
    with pytest.raises(ValueError, match="has 40 inputs; no size fits all experts"):
        run(tmp_path / "odd", tmp_path / "out", method="rtn")


def test_odd_numbers_of_outputs(tmp_path: Path) -> None:
    """Rows that are no multiple of anything: read back, and computed with packed, by few and by many tokens."""
    sizes = {**SIZES, "qk_nope_head_dim": 15, "qk_rope_head_dim": 2, "vocab_size": 97, "n_group": 1, "topk_group": 1}
    sizes |= {"kv_lora_rank": 33, "num_attention_heads": 3, "moe_intermediate_size": 32}
    write_checkpoint(tmp_path / "odd", torch.bfloat16, **sizes)
    folder = run(tmp_path / "odd", tmp_path / "out", method="rtn", targets="linears")
    export(folder, tmp_path / "plain", "bf16", progress=False)
    folders = (folder, tmp_path / "plain")
    models = [DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in folders]
    assert models[0].model.layers[0].self_attn.kv_a_proj_with_mqa.weight.shape == (35, 64)
    for length in (1, 70):
        with torch.no_grad():
            found, expected = (model.eval()(tokens(2, length)).logits.float() for model in models)
        assert relative_error(found, expected) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq"}, "method: found 'awq', allowed are gptq, learned, mse, rtn"),
        ({"group_size": 100}, "group_size: found 100, allowed are 32, 64, 128, 256"),
        ({"targets": "all"}, "targets: found 'all', allowed are experts, linears"),
        ({"calibration_rows": 0}, "calibration_rows: found 0, allowed are whole numbers from 1"),
        ({"calibration_length": 1}, "calibration_length: found 1, allowed are whole numbers from 2"),
        ({"seed": -1}, "seed: found -1, allowed are whole numbers from 0"),
    ],
)
def test_options(checkpoint: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path / "out", **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_compressed_tensors_reads_the_same_weights(checkpoint: Path, tmp_path: Path, method: str) -> None:
    folder, result = run(checkpoint, tmp_path / "out", method=method, targets="linears"), tmp_path / "weights"
    script = Path(__file__).with_name("compressed_tensors_client.py")
    run_client("compressed-tensors", script, str(folder), str(result))
    source, found = Source(folder), load_file(result)
    assert set(found) == {name for name in read_tensors(checkpoint) if targeted(name, "linears")}
    for name, weight in found.items():
        assert torch.equal(weight, source.read(name)), name


@pytest.mark.slow
def test_stock_transformers_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    folder, plain = run(checkpoint, tmp_path / "out"), tmp_path / "plain"
    script, result = Path(__file__).with_name("stock_client.py"), tmp_path / "logits"
    run_client("compressed-tensors", script, str(folder), str(result))
    export(folder, plain, "bf16", progress=False)
    tokens = (7 * torch.arange(2)[:, None] + 3 * torch.arange(24)) % 90 + 2
    ours = DeepseekV3ForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative_error(load_file(result)["logits"], ours(tokens).logits) < 1e-5
