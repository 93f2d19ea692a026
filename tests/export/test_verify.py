"""`verify` on exports that are right, and on exports that are broken in one way each."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, cli
from deepseek_v3.evaluation import speed
from deepseek_v3.export import Source, export
from deepseek_v3.export import verify as verify_module
from deepseek_v3.export.verify import DEFAULTS, Thresholds, verify, verify_table
from deepseek_v3.finetuning import apply_lora
from deepseek_v3.tokenization import train_tokenizer
from tests.evaluation.helpers import tiny_tokenizer, write_checkpoint, write_text
from tests.modeling_deepseek_v3.helpers import build, tiny_config

LOOSE = Thresholds(0.05, 1.0, 0.5, 1.0, 1.0)  # of random weights, which rounding changes more than trained ones


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DECODED", 3), ("REPEATS", 1), ("MTP_TOKENS", 8)):
        monkeypatch.setattr(speed, name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_checkpoint(folder / "model")
    write_text(folder / "text")
    export(folder / "model", folder / "bf16", "bf16", progress=False)
    export(folder / "model", folder / "fp8", "fp8", progress=False)
    return folder


def check(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    options = {"text": str(folder / "text"), "rows": 8, "length": 32, **options}
    return verify(folder / name, folder / "model", **options)


def change(folder: Path, tmp_path: Path, tensor: str, value: Any) -> Path:
    """A copy of the bf16 export in which a tensor is `value` of itself."""
    shutil.copytree(folder / "bf16", tmp_path / "bf16")
    file = tmp_path / "bf16" / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = value(tensors[tensor])
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "bf16"


def test_a_checkpoint_verifies_against_itself(folder: Path) -> None:
    report = check(folder, "model")
    assert report["failures"] == [] and report["format"] == "bf16" and report["mtp_left_out"] is False
    assert report["kl"]["value"] == 0 and report["top1"]["value"] == 1
    assert report["bytes"]["export"] == report["bytes"]["reference"]
    assert report["mtp_acceptance"]["export"] == report["mtp_acceptance"]["reference"]
    assert all(row["relative_error"] == 0 for row in report["tensors"].values())
    assert report == json.loads((folder / "model" / "verify.json").read_text())


def test_bf16_rounds_and_fp8_rounds_more(folder: Path) -> None:
    half, eight = check(folder, "bf16", thresholds=LOOSE), check(folder, "fp8", thresholds=LOOSE)
    assert half["failures"] == eight["failures"] == []
    for kind, row in half["tensors"].items():
        assert 1e-3 < row["relative_error"] < 2.5e-3, kind  # a uniform error of up to 2^-9: 2^-9 / sqrt(3), and less
    assert 0.02 < eight["tensors"]["routed experts"]["relative_error"] < 0.035  # up to 2^-4 / 1.75 / sqrt(3)
    assert eight["tensors"]["norms"] == half["tensors"]["norms"] and eight["format"] == "fp8"
    assert 0 < half["kl"]["value"] < eight["kl"]["value"]
    sizes = [report["bytes_per_parameter"]["export"] for report in (half, eight)]
    assert sizes[1] < 0.8 * sizes[0]
    assert half["bytes"]["export"] == (folder / "bf16" / "model.safetensors").stat().st_size
    assert half["text"] == eight["text"]
    assert half["bits_per_byte"]["reference"] == eight["bits_per_byte"]["reference"]


@pytest.mark.parametrize(
    "form, options, error",
    [
        ("int4", {"method": "rtn", "group_size": 32}, (0.05, 0.15)),
        ("int8", {}, (0.004, 0.012)),
        ("nf4", {}, (0.06, 0.12)),
        ("bnb-int8", {}, (0.004, 0.012)),
    ],
)
def test_packed_formats_are_recognized_and_run(
    form: str, options: dict[str, Any], error: tuple[float, float], folder: Path, tmp_path: Path
) -> None:
    export(folder / "model", tmp_path / form, form, progress=False, **options)
    report = check(folder, tmp_path / form, thresholds=Thresholds(error[1], 1.0, 0.3, 1.0, 1.0))
    assert report["format"] == form and report["weights"] == "packed" and report["failures"] == []
    assert error[0] < report["tensors"]["routed experts"]["relative_error"]
    assert report["tensors"]["router"]["relative_error"] < 0.0025
    assert report["bytes"]["export"] < 0.6 * report["bytes"]["reference"]


def test_gguf_runs_as_plain_matrices_of_its_weights(folder: Path) -> None:
    export(folder / "model", folder / "gguf", "gguf", quantization="Q8_0", progress=False)
    report = check(folder, "gguf", thresholds=LOOSE)
    assert report["failures"] == [] and report["format"] == "gguf" and report["weights"] == "dequantized"
    assert report["tensors"]["norms"]["relative_error"] == report["tensors"]["router"]["relative_error"] == 0
    assert 0.003 < report["tensors"]["attention"]["relative_error"] < 0.01  # 32 weights a scale, codes up to 127
    assert report["bytes"]["export"] == sum(file.stat().st_size for file in (folder / "gguf").glob("*.gguf"))
    assert (folder / "gguf" / "verify.json").is_file()
    file = next((folder / "gguf").glob("*.gguf"))
    assert check(folder, file, thresholds=LOOSE)["kl"] == report["kl"]


@pytest.mark.parametrize("adapted", [False, True])
def test_gguf_without_mtp_layers_is_compared_without_them(folder: Path, tmp_path: Path, adapted: bool) -> None:
    model = folder / "model"
    adapter = tmp_path / "adapter" if adapted else None
    if adapted:
        apply_lora(DeepseekV3ForCausalLM.from_pretrained(model), ["attention"], rank=2).save_pretrained(adapter)
    made = export(model, tmp_path / "gguf", "gguf", adapter=adapter, quantization="F32", mtp=False, progress=False)
    report = check(folder, tmp_path / "gguf", adapter=adapter)
    assert report["failures"] == [] and report["mtp_left_out"] is True and report["mtp_acceptance"] is None
    assert report["kl"]["value"] < 1e-6 and "MTP left out" in verify_table(report)
    assert report["coverage"]["missing"] == [] and not {"MTP", "MTP norms"} & report["tensors"].keys()
    assert report["parameters"] == made["parameters"] > 0
    assert report["bytes_per_parameter"]["export"] == pytest.approx(made["bytes_per_parameter"])


def test_dequantized_matrices_give_the_same_logits(folder: Path) -> None:
    """Official FP8 is dequantized at loading, so that both ways compute from the same matrices."""
    packed = check(folder, "fp8", thresholds=LOOSE)
    plain = check(folder, "fp8", thresholds=LOOSE, weights="dequantized")
    assert plain["weights"] == "dequantized" and plain["decode_tokens_per_second"]["export"] is None
    assert plain["kl"]["value"] == pytest.approx(packed["kl"]["value"], rel=0.05)


def test_thresholds_decide(folder: Path) -> None:
    report = check(folder, "fp8", thresholds=Thresholds(0.01, 1e-9, 1.0, -1.0, -1.0))
    words = "\n".join(report["failures"])
    for what in ("routed experts: relative error", "KL: ", "perplexity", "top predictions", "MTP acceptance"):
        assert what in words
    assert "norms" not in words and "embeddings" not in words  # 16 bits, which is their threshold in every format


def test_a_weight_that_fp8_may_not_touch_fails(folder: Path, tmp_path: Path) -> None:
    broken = change(folder, tmp_path, "model.layers.1.mlp.gate.weight", lambda w: w * 1.02)
    report = check(folder, broken, thresholds=LOOSE)
    assert [failure.split(":")[0] for failure in report["failures"]] == ["router"]
    assert report["tensors"]["router"]["largest_tensor"] == "model.layers.1.mlp.gate.weight"


@torch.no_grad()
def noise(tensor: torch.Tensor) -> torch.Tensor:
    """15 % of it: what 4 bits may cost."""
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return (tensor + 0.15 * tensor.float().norm() / direction.norm() * direction).to(tensor.dtype)


@pytest.mark.parametrize(
    "form, options, names",
    [
        ("int4", {"method": "rtn", "group_size": 32}, ("self_attn.o_proj", "mlp.shared_experts.up_proj")),
        ("int8", {}, ("self_attn.kv_b_proj",)),  # of a kind that else is quantized
        ("nf4", {"targets": "experts"}, ("self_attn.o_proj",)),
    ],
)
def test_a_tensor_that_is_not_quantized_is_only_rounded(
    classifier: Path, tmp_path: Path, form: str, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    export(classifier / "model", tmp_path / form, form, progress=False, **options)
    assert verify(tmp_path / form, classifier / "model")["failures"] == []
    file = tmp_path / form / "model.safetensors"
    changed = {f"model.layers.1.{name}.weight" for name in names}
    tensors = {name: noise(tensor) if name in changed else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    report = verify(tmp_path / form, classifier / "model")
    found = [failure for failure in report["failures"] if "which is not quantized, at most 0.004" in failure]
    assert len(found) == len(changed) and all(any(name in line for line in found) for name in changed)
    assert "relative error 0.15" in found[0] and f"FAILED {found[0]}" in verify_table(report)


def test_gguf_that_quantizes_nothing_is_only_rounded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its types say, and not that it is GGUF."""
    monkeypatch.setattr(verify_module, "_compare_models", lambda *arguments: {})
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    damaged = change(folder, tmp_path, name, noise)
    for quantization, expected in (("F16", 1), ("Q8_0", 0)):
        output = tmp_path / quantization
        export(damaged, output, "gguf", quantization=quantization, progress=False)
        failures = check(folder, output)["failures"]
        assert len(failures) == expected and all(f"of {name}, which is not quantized" in line for line in failures)


def test_a_reference_with_a_nan_is_refused(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    reference = change(folder, tmp_path, name, lambda w: w.index_fill(0, torch.tensor(0), torch.nan))
    with pytest.raises(ValueError, match=f"{name} of the reference: found numbers that are not finite"):
        verify(folder / "fp8", reference)
    with pytest.raises(ValueError, match=f"{name} of the reference"):
        verify(reference, reference)


def test_a_nan_is_named_and_no_logits_are_compared(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    report = check(folder, change(folder, tmp_path, name, lambda w: w.index_fill(0, torch.tensor(0), torch.nan)))
    assert report["failures"] == [f"1 tensors that are not finite, the first {name}"]
    assert "kl" not in report


def test_an_overflow_in_the_forward_pass_is_named(folder: Path, tmp_path: Path) -> None:
    broken = change(folder, tmp_path, "model.layers.0.mlp.up_proj.weight", lambda w: torch.full_like(w, 3e38))
    report = check(folder, broken)
    assert report["non_finite_logits"] == "model.layers.0.mlp.up_proj"
    assert report["failures"][-1] == "logits are not finite, from model.layers.0.mlp.up_proj on"


def test_models_that_end_every_text_at_once_have_no_drafts(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ending", eos_token_id=0)
    file = tmp_path / "ending" / "model.safetensors"
    tensors = load_file(file)
    ended = {name: torch.zeros_like(tensor) if "head" in name else tensor for name, tensor in tensors.items()}
    save_file(ended, file, {"format": "pt"})
    report = verify(tmp_path / "ending", tmp_path / "ending", text=str(folder / "text"), rows=2, length=32)
    assert report["failures"] == [] and report["mtp_acceptance"]["export"]["value"] is None
    assert "MTP acceptance, export      - [-, -]" in verify_table(report)
    drafting = {**report, "mtp_acceptance": {**report["mtp_acceptance"], "reference": {"value": 0.3}}}
    assert verify_module._failures(drafting, DEFAULTS["bf16"]) == ["fall of the MTP acceptance: 0.3, at most 0.1"]


def test_a_vocabulary_too_small_for_the_tokenizer_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model", vocab_size=280)
    monkeypatch.setattr(Source, "read", None)
    with pytest.raises(ValueError, match="token .* has id 299, but config.vocab_size is 280"):
        verify(tmp_path / "model", tmp_path / "model")


def test_an_export_without_mtp_layers_fails(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bf16", tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    file = tmp_path / "bf16" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".layers.3." not in name}, file)
    report = check(folder, tmp_path / "bf16")
    assert all(".layers.3." in name for name in report["coverage"]["missing"])
    assert report["failures"][0].startswith(f"{len(report['coverage']['missing'])} missing tensors: model.layers.3.")
    assert "config: num_nextn_predict_layers is 0, was 1" in report["failures"]
    assert "kl" not in report


def test_a_lost_field_of_the_configuration_fails(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bf16", tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    del config["topk_group"], config["rms_norm_eps"]
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config))
    failures = check(folder, tmp_path / "bf16", thresholds=LOOSE)["failures"]
    assert "config: topk_group is 4, was 2" in failures


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has no logits to compare, which takes most of the time."""
    folder = tmp_path_factory.mktemp("classifier")
    config = tiny_config(vocab_size=300, num_labels=2, moe_intermediate_size=32)
    model = build(config, DeepseekV3ForSequenceClassification)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    export(folder / "model", folder / "fp8", "fp8", progress=False)
    export(folder / "model", folder / "int4", "int4", method="rtn", group_size=32, progress=False)
    export(folder / "model", folder / "int8", "int8", progress=False)
    return folder


def test_a_classifier_is_compared_by_its_tensors(classifier: Path) -> None:
    report = verify(classifier / "fp8", classifier / "model")
    assert report["failures"] == [] and "kl" not in report and report["tensors"]["head"]["parameters"] == 128
    assert "bytes" in verify_table(report)


def test_one_destroyed_tensor_fails_and_is_named(classifier: Path, tmp_path: Path) -> None:
    """Of 48 it changes the error of their kind by little."""
    shutil.copytree(classifier / "int4", tmp_path / "int4")
    file, name = tmp_path / "int4" / "model.safetensors", "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, f"{name}_scale": torch.zeros_like(tensors[f"{name}_scale"])}, file, {"format": "pt"})
    report = verify(tmp_path / "int4", classifier / "model")
    assert 0.15 < report["tensors"]["routed experts"]["relative_error"] < 0.2 == DEFAULTS["int4"].relative_error
    assert report["failures"] == [f"routed experts: relative error 1 of {name}, at most 0.5"]
    assert verify(classifier / "int4", classifier / "model")["failures"] == []


@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("stated", [None, "mixed-precision"])
def test_compressed_tensors_that_state_no_single_format(
    classifier: Path, tmp_path: Path, form: str, stated: str | None
) -> None:
    shutil.copytree(classifier / form, tmp_path / form)
    config = json.loads((tmp_path / form / "config.json").read_text())
    config["quantization_config"]["format"] = stated
    (tmp_path / form / "config.json").write_text(json.dumps(config))
    report = verify(tmp_path / form, classifier / "model")
    assert report["format"] == form and report["failures"] == []


def test_the_folder_that_one_stands_in_has_a_name(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(classifier / "fp8")
    report = verify(".", "../model/.")
    assert report["export"] == "fp8" and report["against"] == "model"


def test_text_is_cut_by_the_tokenizer_that_goes_along(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's own, where the base has another one or none."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(folder / "model", base)
    train_tokenizer(["nothing of the kind"] * 9, 280).save_pretrained(base)
    apply_lora(DeepseekV3ForCausalLM.from_pretrained(base), ["attention"], rank=2).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    monkeypatch.setattr(verify_module, "_compare_models", lambda *arguments: {})
    expected = check(folder, "bf16")["text"]
    for _ in range(2):
        report = verify(folder / "bf16", adapter, text=str(folder / "text"), rows=8, length=32)
        assert report["failures"] == [] and report["text"] == expected
        (base / "tokenizer.json").unlink(missing_ok=True)


def test_the_command_that_export_names_compares_with_the_merged_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, out = str(folder / "model"), str(tmp_path / "my adapter"), str(tmp_path / "out")
    model = apply_lora(DeepseekV3ForCausalLM.from_pretrained(base), ["attention"], rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.save_pretrained(adapter)
    (tmp_path / "my adapter" / "README.md").write_text("---\nlicense: mit\n---\n## Limitations\n\nOf the adapter.\n")
    options = ["--format", "bf16", "--set", "dtype=fp32", "--output", out]
    assert cli.main(["export", base, "--adapter", adapter, *options]) == 0
    program, *command = shlex.split(capsys.readouterr().out.split("try: ")[1])
    text = ["--text", str(folder / "text"), "--rows", "2"]
    assert program == "deepseek-v3" and cli.main([*command, *text]) == 0
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["against"] == "model + my adapter" and report["kl"]["value"] == 0
    assert all(row["largest"] == 0 for row in report["tensors"].values())
    assert "Of the adapter." in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(verify_module, "_compare_models", lambda *arguments: {})
    assert cli.main(["verify", out, "--against", base, *text]) == 1
    assert "FAILED attention" in capsys.readouterr().out


def test_a_reference_without_a_tokenizer_is_named_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    monkeypatch.setattr(Source, "read", None)
    with pytest.raises(ValueError, match=f"{tmp_path}/model: found no tokenizer.json, which the comparison of logits"):
        verify(folder / "bf16", tmp_path / "model")


def test_the_table_holds_every_figure(folder: Path) -> None:
    report = check(folder, "fp8", thresholds=Thresholds(0.05, 1e-9, 0.5, 1.0, 1.0))
    table = verify_table(report)
    assert f"{report['kl']['value']:.6f}" in table and "n = 8 rows" in table
    assert f"{report['bits_per_byte']['delta']['value']:+.5f}" in table
    assert [line for line in table.splitlines() if line.startswith("FAILED")] == [f"FAILED {report['failures'][0]}"]
    for kind, row in report["tensors"].items():
        assert any(line.startswith(kind) and row["largest_tensor"] in line for line in table.splitlines())


def test_every_format_has_thresholds() -> None:
    from deepseek_v3.export import FORMATS

    assert set(DEFAULTS) == set(FORMATS)
    assert DEFAULTS["fp8"].perplexity == 0.003 and DEFAULTS["int4"].perplexity == 0.01


def test_a_folder_with_two_gguf_files_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="2 GGUF files; name one"):
        check(folder, tmp_path)
