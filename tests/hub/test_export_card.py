"""The card of an export, made from a real export and a real comparison, published and loaded back."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from deepseek_v3 import DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification
from deepseek_v3.cli import main
from deepseek_v3.evaluation import speed
from deepseek_v3.export.run import export
from deepseek_v3.export.verify import verify
from deepseek_v3.finetuning import apply_lora
from deepseek_v3.hub import push, write_export_card
from tests.finetuning.runs import make_tokenizer, save_base
from tests.hub.conftest import CARD
from tests.hub.fakehub import FakeHub
from tests.training.helpers import write_corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("source") / "base")
    (folder / "README.md").write_text(f"{CARD}\n## Limitations\n\nKnows twelve words.\n\n## Licence\n\nx\n")
    return folder


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    folder = source.parent / "fp8"
    export(source, folder, "fp8", progress=False)
    verify(folder, source, text=str(write_corpus(source.parent / "text") / "d0.txt"), rows=4, length=32)
    return folder


def records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    report, verified = (json.loads((folder / name).read_text()) for name in ("export.json", "verify.json"))
    return report, verified


def test_the_figures_are_the_records(source: Path, exported: Path) -> None:
    report, verified = records(exported)
    card = write_export_card(exported, source, base_model="some/base").read_text()
    assert "$" not in card and "None" not in card and str(source.parent) not in card
    for name in ("bytes", "parameters"):
        assert f"{report[name]:,}" in card
    assert f"{report['bytes_per_parameter']:.3f} per parameter" in card
    quantized = report["quantized"]
    assert f"{quantized['share']:.1%} of the parameters, in {quantized['bytes']:,} bytes" in card
    for figure, form in (("kl", ".6f"), ("top1", ".2%"), ("perplexity_change", "+.3%")):
        value, low, high = (format(verified[figure][end], form) for end in ("value", "low", "high"))
        assert f"| {value} [{low}, {high}] |" in card
    bits = verified["bits_per_byte"]
    assert f"| {bits['reference']['value']:.4f} [" in card and f"| {bits['export']['value']:.4f} [" in card
    for kind, row in verified["tensors"].items():
        assert f"| {kind} | {row['tensors']} | {row['parameters']:,} | {row['relative_error']:.2e} |" in card
    for name, digest in report["source"]["files"].items():
        assert f"| `{name}` | `{digest}` |" in card
    for key in ("git", "hardware", "torch"):
        assert report["environment"][key] in card
    assert "The original's card says:\n\nKnows twelve words.\n\n## Licence\n\nWeights: apache-2.0." in card
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation, data.license) == ("some/base", "quantized", "apache-2.0")
    index = {result.metric_type: result for result in data.eval_results}
    assert index["kl_divergence"].metric_value == round(verified["kl"]["value"], 6)
    assert index["bits_per_byte"].metric_name.endswith(f"n = {bits['export']['n']}")


def test_past_a_threshold_and_without_what_may_lack(source: Path, exported: Path, tmp_path: Path) -> None:
    report, verified = records(exported)
    for name, value in (("mtp_acceptance", None), ("failures", ["KL: 3, at most 0.1"])):
        verified[name] = value
    del report["quantized"]["parameters"]
    report["quantized"]["parameters"] = 0
    report["calibration"] = {"text": str(tmp_path / "calm.txt"), "sha256": "c" * 64, "rows": 8}
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((exported / name).read_text())
    (tmp_path / "export.json").write_text(json.dumps(report))
    (tmp_path / "verify.json").write_text(json.dumps(verified))
    card = write_export_card(tmp_path).read_text()
    assert "; past its thresholds:\n\n- KL: 3, at most 0.1" in card
    assert "MTP drafts" not in card and "quantized |" not in card
    assert "Calibration: text calm.txt, sha256 ccc" in card
    assert not {"base_model", "base_model_relation", "license"} & ModelCard(card).data.to_dict().keys()
    del verified["kl"]
    (tmp_path / "verify.json").write_text(json.dumps(verified))
    assert "Tensors only were compared" in write_export_card(tmp_path).read_text()


NEEDED = [
    *[("export", key) for key in ("format", "options", "source", "parameters", "bytes", "bytes_per_parameter")],
    *[("export", key) for key in ("quantized", "calibration", "environment", "seconds", "peak_memory_bytes")],
    *[("export", "environment", key) for key in ("git", "hardware", "python", "torch")],
    *[("export", "source", key) for key in ("name", "files", "adapter")],
    *[("verify", key) for key in ("tensors", "top1", "bits_per_byte", "perplexity_change", "mtp_acceptance")],
    *[("verify", key) for key in ("text", "weights", "decode_tokens_per_second", "speed", "bytes", "date")],
    ("verify", "failures"),
    *[("verify", "text", key) for key in ("name", "sha256", "tokens", "rows", "length", "seed")],
    *[("verify", "bits_per_byte", "delta"), ("verify", "kl", "low")],
]


@pytest.mark.parametrize("path", NEEDED, ids=".".join)
def test_a_missing_field_is_named(exported: Path, path: tuple[str, ...], tmp_path: Path) -> None:
    for name, content in zip(("export", "verify"), records(exported), strict=True):
        inner = {name: content}
        for key in path[:-1]:
            inner = inner.get(key, {})
        inner.pop(path[-1], None)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    (tmp_path / "README.md").write_text("the card before")
    with pytest.raises(ValueError, match=f"have no field '{path[-1]}'"):
        write_export_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "the card before"


@pytest.mark.parametrize("name", ["export", "verify"])
def test_a_missing_record_is_named(exported: Path, name: str, tmp_path: Path) -> None:
    for path in exported.glob("*.json"):
        if path.name != f"{name}.json":
            (tmp_path / path.name).write_text(path.read_text())
    with pytest.raises(ValueError, match=f"{name}.json: not found; `deepseek-v3 {name}` writes it"):
        write_export_card(tmp_path)


def test_an_export_is_published_and_loaded_back(
    hub: FakeHub,
    source: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    write_export_card(exported, source)
    with pytest.raises(ValueError, match="base_model is missing, and a quantized model's card"):
        push(exported, "tester/fp8")
    push(source, "tester/base")
    result = push(exported, "tester/fp8", base_model="tester/base")
    assert {"export.json", "verify.json", "SHA256SUMS", "README.md", "model.safetensors"} <= set(result.files)
    card = ModelCard.load("tester/fp8")
    card.validate()
    assert (card.data.base_model, card.data.base_model_relation) == ("tester/base", "quantized")

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)  # the code of the pushed card loads from the Hub
    assert scope["repository"] == "tester/fp8" and capsys.readouterr().out.strip()
    here = AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(ids).logits, here(ids).logits)


def test_a_gguf_file_s_card(source: Path, tmp_path: Path, hub: FakeHub) -> None:
    pytest.importorskip("gguf")
    export(source, tmp_path / "gguf", "gguf", quantization="Q8_0", mtp=False, progress=False)
    verify(tmp_path / "gguf", source, text=str(write_corpus(tmp_path / "text") / "d0.txt"), rows=4, length=32)
    card = write_export_card(tmp_path / "gguf", source).read_text()
    assert "| MTP drafts accepted |" not in card and "| MTP layers | there | left out |" in card
    (name,) = (path.name for path in (tmp_path / "gguf").glob("*.gguf"))
    assert f"llama-cli --model {name}" in card and "GGUF Q8_0, architecture deepseek2" in card
    assert "## Architecture" not in card and ModelCard(card).data.library_name == "gguf"
    push(source, "tester/base")
    assert name in push(tmp_path / "gguf", "tester/gguf", base_model="tester/base").files
    (tmp_path / "gguf" / "export.json").unlink()
    with pytest.raises(ValueError, match=f"{name}: export.json beside it does not say whether it is whole"):
        push(tmp_path / "gguf", "tester/gguf", base_model="tester/base")


def test_16_bits_are_no_quantization(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "bf16", "bf16", progress=False)
    verify(tmp_path / "bf16", source, text=str(write_corpus(tmp_path / "text") / "d0.txt"), rows=4, length=32)
    data = ModelCard.load(write_export_card(tmp_path / "bf16", source, base_model="some/base")).data
    assert data.base_model == "some/base" and "base_model_relation" not in data


def test_the_card_that_peft_saves_does_not_stop_verify(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in (("DECODED", 3), ("REPEATS", 1), ("MTP_TOKENS", 8)):
        monkeypatch.setattr(speed, name, value)
    adapter, folder = tmp_path / "adapter", tmp_path / "bf16"
    apply_lora(AutoModelForCausalLM.from_pretrained(source), rank=2).save_pretrained(adapter)
    export(adapter, folder, "bf16", dtype="fp32", progress=False)
    text = str(write_corpus(tmp_path / "text") / "d0.txt")
    assert main(["verify", str(folder), "--against", str(adapter), "--text", text, "--rows", "4"]) == 0
    assert f"base_model is {str(source)!r}"[:40] in capsys.readouterr().out
    assert ModelCard.load(folder / "README.md").data.base_model is None


@pytest.mark.parametrize("card", ["# My model\n", "---\nlicense: other\nlicense_name: own\n---\n\n# My model\n"])
def test_a_source_s_card_that_is_not_valid_gives_nothing(
    exported: Path, card: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "fp8"))
    (folder / "README.md").unlink(missing_ok=True)
    (tmp_path / "README.md").write_text(card)
    assert ModelCard.load(write_export_card(folder, tmp_path)).data.license is None
    assert re.search(r"README.md: .*; nothing is taken from that card", capsys.readouterr().out)


def test_a_licence_with_a_name_of_its_own_is_taken_whole(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "fp8"))
    (folder / "README.md").unlink(missing_ok=True)
    link = "https://example.org/licence"
    front = f"license: other\nlicense_name: own\nlicense_link: {link}\n"
    (tmp_path / "README.md").write_text(f"---\n{front}---\n\n# My model\n")
    card = ModelCard.load(write_export_card(folder, tmp_path))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "own", link)
    assert "Weights: own." in card.text


@pytest.mark.parametrize(
    "merged, relation, expected",
    [(True, "adapter", "finetune"), (True, None, "finetune"), (False, "quantized", None), (False, "merge", "merge")],
)
def test_what_plain_weights_are_to_the_base_of_their_source(
    exported: Path, merged: bool, relation: str | None, expected: str | None, tmp_path: Path
) -> None:
    """They are no adapter and not quantized, whatever the source was."""
    report, _ = records(exported)
    report["format"] = "bf16"
    report["options"] = {"dtype": "bf16"}
    report["source"]["adapter"] = {"name": "adapter", "files": {}} if merged else None
    for name in ("config.json", "verify.json"):
        shutil.copy(exported / name, tmp_path)
    (tmp_path / "export.json").write_text(json.dumps(report))
    (tmp_path / "source").mkdir()
    front = "base_model: me/base\n" + (f"base_model_relation: {relation}\n" if relation else "")
    (tmp_path / "source" / "README.md").write_text(CARD.replace("license:", f"{front}license:"))
    data = ModelCard.load(write_export_card(tmp_path, tmp_path / "source")).data
    assert (data.base_model, data.get("base_model_relation")) == ("me/base", expected)


def test_a_changed_card_is_kept(source: Path, exported: Path) -> None:
    path = write_export_card(exported, source)
    path.write_text(changed := path.read_text().replace("apache-2.0", "mit"))
    assert write_export_card(exported, source, base_model="some/base") == path and path.read_text() == changed
    path.unlink()


@pytest.mark.parametrize(
    "cls, auto, task",
    [
        (DeepseekV3ForTokenClassification, "AutoModelForTokenClassification", "token-classification"),
        (DeepseekV3ForSequenceClassification, "AutoModelForSequenceClassification", "text-classification"),
    ],
)
def test_the_card_of_a_classifier(
    source: Path, cls: type, auto: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that was made, not the card of its base, tells what it is for."""
    original, folder = tmp_path / "original", tmp_path / "bf16"
    cls.from_pretrained(source, num_labels=3).save_pretrained(original)
    make_tokenizer().save_pretrained(original)
    export(original, folder, "bf16", progress=False)
    verify(folder, original)
    for base in (None, source):
        card = write_export_card(folder, base).read_text()
        assert ModelCard(card).data.pipeline_tag == task and "generate(" not in card
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert type(scope["model"]) is cls and f"import {auto}, " in code


def test_an_export_that_failed_goes_with_a_card_that_says_so(
    hub: FakeHub, source: Path, exported: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "fp8"))
    write_export_card(folder, source, base_model="tester/base")
    record = json.loads((folder / "verify.json").read_text())
    record["failures"] = ["KL: 3, at most 0.1", "top-1: 0.5, at least 0.9"]
    (folder / "verify.json").write_text(json.dumps(record))
    push(source, "tester/base")
    with pytest.raises(ValueError, match="verify.json: found 2 failures that README.md .*the first: KL: 3, at"):
        push(folder, "tester/fp8")
    write_export_card(folder, source, base_model="tester/base")
    assert b"- KL: 3, at most 0.1" in hub.files(push(folder, "tester/fp8").repo_id)["README.md"]
