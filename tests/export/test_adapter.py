"""Adapters merged from their files, against PEFT's `merge_and_unload`; variants that are not plain LoRA."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)
from deepseek_v3.export import Source, export
from deepseek_v3.export.gguf import read_gguf
from deepseek_v3.finetuning import apply_lora, load_adapter
from deepseek_v3.tokenization import train_tokenizer
from tests.evaluation.helpers import tiny_tokenizer
from tests.evaluation.helpers import write_checkpoint as write_with_tokenizer
from tests.export.gguf_models import export_gguf, save_model
from tests.export.helpers import config_json, read_tensors, write_checkpoint
from tests.modeling_deepseek_v3.helpers import relative_error, tokens

PREFIX = "base_model.model.model"


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """An adapter that has learnt something: PEFT's own B is zero, or small noise is added to whole modules."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def check(model: PeftModel, base: Path, folder: Path, exact: float = 1e-6) -> dict[str, Any]:
    """Export base + adapter in fp32 and compare with PEFT's merge, saved by transformers."""
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    report = export(base, folder / "out", "bf16", adapter=folder / "adapter", dtype="fp32")
    expected, found, before = (read_tensors(path) for path in (folder / "merged", folder / "out", base))
    missing = {name for name in found.keys() ^ expected.keys() if ".layers.3." not in name}
    assert not missing
    changed = 0
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) <= exact, name
        changed += name not in before or not torch.equal(found[name], before[name])
    report["changed"] = changed
    return report


@pytest.mark.parametrize("rank", [3, {"attention": 2, "dense_mlp": 3, "shared_experts": 4, "experts": 5, "router": 1}])
def test_every_target_and_the_mtp_layer(plain: Path, tmp_path: Path, rank: Any) -> None:
    model = DeepseekV3ForCausalLM.from_pretrained(plain)
    model = trained(apply_lora(model, ["all", "router"], rank=rank, mtp=True))
    report = check(model, plain, tmp_path)
    assert report["changed"] == 4 * 5 + 3 + 3 * (3 + 24 + 1)  # all linear layers, every expert, the routers
    assert report["source"]["adapter"]["files"].keys() == {"adapter_model.safetensors"}


@pytest.mark.parametrize("weights", [["gate_up_proj"], ["down_proj"]])
def test_one_of_the_experts_weights(plain: Path, tmp_path: Path, weights: list[str]) -> None:
    model = StockForCausalLM.from_pretrained(plain)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=[f"mlp.experts.{w}" for w in weights])
    report = check(trained(get_peft_model(model, config)), plain, tmp_path)
    assert report["changed"] == 2 * 8 * (2 if weights == ["gate_up_proj"] else 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_b_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["o_proj", "lm_head"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {
            "target_modules": ["o_proj", "q_a_proj"],
            "rank_pattern": {"q_a_proj": 5},
            "alpha_pattern": {r".*\.1\..*": 3},
        },
        {"target_modules": ["kv_b_proj"], "modules_to_save": ["lm_head", "embed_tokens", "kv_a_layernorm"]},
    ],
)
def test_what_plain_peft_saves_for_stock_models(plain: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    """PEFT rewrites some of these targets into the fused experts' parameters, with ranks of their own."""
    model = StockForCausalLM.from_pretrained(plain)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **arguments))
    assert check(trained(model), plain, tmp_path)["changed"] >= 4


@torch.no_grad()
def test_copies_in_the_mtp_layer_follow_the_merged_tensors(plain: Path, tmp_path: Path) -> None:
    model = StockForCausalLM.from_pretrained(plain)
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], modules_to_save=["embed_tokens"]))
    check(trained(model), plain, tmp_path)
    found, before = read_tensors(tmp_path / "out"), read_tensors(plain)
    for copy, original in Source(plain).copies.items():
        assert torch.equal(found[copy], found[original]) and not torch.equal(found[copy], before[copy])
    source = Source(plain, tmp_path / "adapter")
    assert torch.equal(source.read("model.embed_tokens.weight"), found["model.embed_tokens.weight"])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    "trained_by", [{"modules_to_save": ["embed_tokens"]}, {"target_parameters": ["embed_tokens.weight"]}]
)
@torch.no_grad()
def test_a_trained_embedding_leaves_a_tied_head(tmp_path: Path, trained_by: dict[str, Any], kept: bool) -> None:
    """As PEFT runs and merges it: the head is the base's embedding. `kept`: the base's file holds the head too."""
    base = write_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    model = DeepseekV3ForCausalLM.from_pretrained(base)
    tensors = read_tensors(base)
    before = tensors["model.embed_tokens.weight"]
    if kept:
        save_file({**tensors, "lm_head.weight": before.clone()}, base / "model.safetensors")
    config = LoraConfig(r=2, target_modules=["q_b_proj"], task_type="CAUSAL_LM", **trained_by)
    model = trained(get_peft_model(model, config)).eval()
    ids = tokens(2, 12)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    export(base, tmp_path / "out", "bf16", adapter=tmp_path / "adapter", dtype="fp32")
    merged, found = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out").eval(), read_tensors(tmp_path / "out")
    assert relative_error(merged(ids).logits, expected) < 1e-5
    assert torch.equal(found["lm_head.weight"], before) and not merged.config.tie_word_embeddings
    for copy, original in Source(tmp_path / "out").copies.items():
        assert torch.equal(found[copy], found[original])


@pytest.mark.parametrize("arguments", [{"modules_to_save": ["embed_tokens"]}, {}])
def test_only_a_trained_embedding_unties_the_head(tmp_path: Path, arguments: dict[str, Any]) -> None:
    base = write_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = read_tensors(base)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    config = LoraConfig(r=2, target_modules=["q_b_proj"], **arguments)
    trained(get_peft_model(DeepseekV3ForCausalLM.from_pretrained(base), config)).save_pretrained(tmp_path / "adapter")
    source = Source(base, tmp_path / "adapter")
    assert source.config.tie_word_embeddings == (not arguments) == ("lm_head.weight" not in source.names)
    save_file({**tensors, **head}, base / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Source(base, tmp_path / "adapter").check_copies()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model with a real tokenizer, whose configuration has no padding token."""
    folder = tmp_path_factory.mktemp("base")
    write_with_tokenizer(folder)
    assert config_json(folder)["pad_token_id"] is None and tiny_tokenizer().pad_token_id is not None
    return folder


@pytest.mark.parametrize("cls", [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification])
@torch.no_grad()
def test_a_classifiers_adapter_brings_its_head(base: Path, tmp_path: Path, cls: type) -> None:
    model = cls.from_pretrained(base, num_labels=3, pad_token_id=0)
    model = trained(apply_lora(model, ["attention", "experts"], rank=2))
    ids = tokens(2, 12)
    report = check(model, base, tmp_path)
    assert config_json(tmp_path / "out")["architectures"] == [cls.__name__]
    merged = cls.from_pretrained(tmp_path / "out", pad_token_id=0).eval()
    expected = cls.from_pretrained(tmp_path / "merged", pad_token_id=0).eval()
    assert merged.config.num_labels == 3 and relative_error(merged(ids).logits, expected(ids).logits) < 1e-5
    tensors = read_tensors(tmp_path / "out")
    assert "lm_head.weight" not in tensors and not any(".layers.3." in name for name in tensors)
    assert report["tensors"]["dropped"] == 1 + 42  # the head and the MTP layer


@pytest.fixture
def classifier(base: Path, tmp_path: Path) -> Path:
    """A classifier's adapter, with the record that its run left beside it."""
    model = DeepseekV3ForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    trained(apply_lora(model, ["attention"], rank=2)).save_pretrained(tmp_path / "adapter")
    record_labels(tmp_path / "adapter", ["bad", "fair", "good"])
    return tmp_path / "adapter"


def record_labels(adapter: Path, labels: Any) -> None:
    (adapter / "run.json").write_text(json.dumps({"finished": True, "task": {"name": "x", "labels": labels}}))


def test_a_classifiers_adapter_brings_its_labels_and_padding(
    classifier: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As the merge of fine-tuning itself writes them."""
    export(base, tmp_path / "out", "bf16", adapter=classifier)
    config = config_json(tmp_path / "out")
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert config["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    assert config["pad_token_id"] == tiny_tokenizer().pad_token_id
    model = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model(tokens(2, 12)).logits.shape == (2, 3)  # of a batch, which needs the padding token
    assert capsys.readouterr().out == ""
    record_labels(classifier, ["worst", "fair", "good"])
    with pytest.raises(ValueError, match="holds another export, with another source"):
        export(base, tmp_path / "out", "bf16", adapter=classifier)


def test_padding_is_of_the_tokenizer_that_goes_along(classifier: Path, base: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "7"
    tokenizer.save_pretrained(classifier)
    assert Source(base, classifier).config.pad_token_id == tokenizer.convert_tokens_to_ids("7")


def test_padding_of_the_base_is_kept(classifier: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "padded")
    (tmp_path / "padded" / "config.json").write_text(json.dumps({**config_json(base), "pad_token_id": 9}))
    assert Source(tmp_path / "padded", classifier).config.pad_token_id == 9


def test_a_tokenizer_that_is_no_part_of_the_base_is_refused(classifier: Path, base: Path) -> None:
    train_tokenizer(["some other text"], 310).save_pretrained(classifier)
    with pytest.raises(ValueError, match="token .* has id 3.., but config.vocab_size is 300"):
        Source(base, classifier)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"task": ["bad", "fair", "good"]},
        {"task": {"labels": None}},
        {"task": {"labels": "abc"}},
        {"task": {"labels": ["bad", "good"]}},
        {"task": {"labels": ["bad", "bad", "good"]}},
        {"task": {"labels": ["bad", ["fair"], "good"]}},
        {"task": {"labels": ["bad", 2, "good"]}},
    ],
)
def test_labels_that_no_record_names_keep_their_numbers(
    classifier: Path, base: Path, tmp_path: Path, content: Any, capsys: pytest.CaptureFixture
) -> None:
    (classifier / "run.json").write_text(json.dumps(content))
    if content is None:
        (classifier / "run.json").unlink()
    export(base, tmp_path / "out", "bf16", adapter=classifier)
    assert config_json(tmp_path / "out")["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "run.json names no 3 labels" in said and "LABEL_0" in said


@pytest.mark.parametrize(
    "content, message",
    [("{", "not valid JSON"), ('{"a": 1, "a": 2}', "not valid JSON .duplicate"), ("[" * 10**5, "nested too deeply")],
)
def test_a_record_that_cannot_be_read_is_named(classifier: Path, base: Path, content: str, message: str) -> None:
    (classifier / "run.json").write_text(content)
    with pytest.raises(ValueError, match=f"run.json: {message}"):
        Source(base, classifier)


def test_an_adapter_from_an_nf4_base_goes_into_no_other(adapter: Path, plain: Path, tmp_path: Path) -> None:
    """NF4 moves weights by 9 %, and the adapter was trained on top of that."""
    for quantize in ("none", "nf4"):
        (adapter / "run.json").write_text(json.dumps({"finished": True, "recipe": {"quantize": quantize}}))
        if quantize == "none":
            Source(plain, adapter)
    message = f"{adapter / 'run.json'}: recipe.quantize is 'nf4', but {plain} is not in NF4; export merged/, which"
    for source in ((plain, adapter), (adapter,)):
        with pytest.raises(ValueError, match=message):
            Source(*source)
    export(plain, tmp_path / "fp8", "fp8", progress=False)
    with pytest.raises(ValueError, match="fp8 is not in NF4"):
        Source(tmp_path / "fp8", adapter)
    export(plain, tmp_path / "nf4", "nf4", progress=False)
    Source(tmp_path / "nf4", adapter)


def test_a_bf16_base_is_rounded_once(ragged: Path, tmp_path: Path) -> None:
    """PEFT rounds the update before it adds it, so that its own result is up to two roundings away."""
    model = trained(apply_lora(DeepseekV3ForCausalLM.from_pretrained(ragged), ["all"], rank=4))
    model.save_pretrained(tmp_path / "adapter")
    exact = load_adapter(DeepseekV3ForCausalLM.from_pretrained(ragged, dtype=torch.float32), tmp_path / "adapter")
    exact.merge_and_unload().to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    export(ragged, tmp_path / "out", "bf16", adapter=tmp_path / "adapter")
    expected, found = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "out")
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    for name in different:  # sums that lie between two bf16 numbers may go either way
        assert (expected[name] != found[name]).float().mean() < 1e-3, name
    assert len(different) < len(expected) / 2


def test_a_small_update_of_a_bf16_base_is_kept_in_fp32(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", torch.bfloat16)
    model = trained(apply_lora(DeepseekV3ForCausalLM.from_pretrained(base), ["attention"], rank=2))
    model.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", lora_alpha=0.002)  # 3e-4 of the weights, a fraction of bf16's steps
    name = "model.layers.1.self_attn.o_proj.weight"
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.replace('weight', f'lora_{half}.weight')}"].double() for half in "AB")
    before = read_tensors(base)[name].double()
    assert relative_error(before + 0.001 * b @ a, before) < 5e-4
    export(base, tmp_path / "out", "bf16", adapter=tmp_path / "adapter", dtype="fp32")
    gguf = read_gguf(export_gguf(base, tmp_path / "gguf", "F32", adapter=tmp_path / "adapter"))
    for found in (read_tensors(tmp_path / "out")[name], gguf.read(name)):
        assert relative_error(found.double() - before, 0.001 * b @ a) < 1e-3


def test_an_adapter_alone_names_its_base(plain: Path, tmp_path: Path) -> None:
    model = trained(apply_lora(DeepseekV3ForCausalLM.from_pretrained(plain), rank=2))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("the adapter's own")
    assert Source(tmp_path / "adapter").folder == plain
    export(tmp_path / "adapter", tmp_path / "out", "fp8")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the adapter's own"
    with pytest.raises(ValueError, match="adapter: found one with .*, which is an adapter itself"):
        Source(tmp_path / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path="someone/on-the-hub")
    with pytest.raises(ValueError, match="base_model_name_or_path is 'someone/on-the-hub', allowed is a local folder"):
        Source(tmp_path / "adapter")


def test_another_adapter_is_another_export(adapter: Path, plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "out", "bf16", adapter=adapter)
    change(adapter, lora_alpha=5)
    with pytest.raises(ValueError, match="holds another export, with another source"):
        export(plain, tmp_path / "out", "bf16", adapter=adapter)


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    model = apply_lora(DeepseekV3ForCausalLM.from_pretrained(plain), ["attention", "experts"], rank=2)
    trained(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_dora": True}, "use_dora: found True, allowed nothing"),
        ({"lora_bias": True}, "lora_bias: found True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: found True"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices: found \[1\]"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"a_variant_of_tomorrow": {"x": 1}}, "a_variant_of_tomorrow"),
        ({"peft_type": "VERA"}, "peft_type: found 'VERA', allowed 'LORA'"),
        ({"bias": "all"}, "bias: found 'all', allowed one of 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa', allowed one of True"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: found 'loftq'"),
        ({"r": 4}, "found rank 4 and alpha .*, whose factors have rank 2"),
        ({"r": None}, "r: found None"),
        ({"lora_alpha": "many"}, "lora_alpha: found 'many'"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
        ({"target_parameters": "experts"}, "target_parameters: found 'experts', allowed a list"),
        ({"alpha_pattern": {"(a+)+b": 3}}, r"alpha_pattern: found '\(a\+\)\+b', allowed no pattern with a repeated"),
        ({"alpha_pattern": {".*.*.*.*.*x": 3}}, "alpha_pattern: found"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: found"),
        ({"rank_pattern": [1]}, r"rank_pattern: found \[1\], allowed an object"),
        ({"rank_pattern": {f"x{i}": 1 for i in range(2**14 + 1)}}, "rank_pattern: .* allowed at most 16384 names"),
        ({"rank_pattern": {f".*x{i}": 1 for i in range(65)}}, "rank_pattern: .* allowed at most 64 patterns"),
        ({"a_list": "x" * 2**24}, r"found over 16777216 bytes"),
    ],
)
def test_variants_and_nonsense_are_refused_by_name(
    adapter: Path, plain: Path, fields: dict[str, Any], message: str
) -> None:
    change(adapter, **fields)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        Source(plain, adapter)
    assert time.monotonic() - began < 2 and "adapter_config.json" in str(error.value)


def test_a_real_dora_adapter_is_refused(plain: Path, tmp_path: Path) -> None:
    model = StockForCausalLM.from_pretrained(plain)
    get_peft_model(model, LoraConfig(target_modules=["o_proj"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora: found True"):
        Source(plain, tmp_path)
    change(tmp_path, use_dora=False)
    with pytest.raises(ValueError, match="o_proj.lora_magnitude_vector .* is neither a factor of plain LoRA nor one"):
        Source(plain, tmp_path)


def test_files_that_do_not_fit_the_base_are_refused(adapter: Path, plain: Path, ragged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_A \[2, 64\] and lora_B .*, which do not fit the base's"):
        Source(ragged, adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{PREFIX}.layers.1.mlp.experts.lora_B.weight"
    for broken, message in (
        ({n: t for n, t in tensors.items() if n != name}, "has lora_A, allowed are lora_A and lora_B"),
        ({**tensors, name: tensors[name].int()}, "lora_B.weight is I32, allowed are BF16, F16, F32, F64"),
        ({**tensors, f"{PREFIX}.layers.77.x.lora_A.weight": torch.zeros(2, 2),
          f"{PREFIX}.layers.77.x.lora_B.weight": torch.zeros(2, 2)}, "layers.77.x is adapted, but no weight"),
        ({**tensors, "base_model.model.lm_head.weight": torch.zeros(97, 64),
          "base_model.model.lm_head.base_layer.weight": torch.zeros(97, 64)}, "lm_head.*weight .* is neither"),
        ({**tensors, f"{PREFIX}.norm.weight": torch.zeros(3)}, r"model.norm.weight \[3\] is neither"),
    ):  # fmt: skip
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            Source(plain, adapter)
    save_file({}, file)
    with pytest.raises(ValueError, match="holds no tensor"):
        Source(plain, adapter)
    file.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(ValueError, match="found no adapter_model.safetensors, allowed are adapters in that file"):
        Source(plain, adapter)
    with pytest.raises(ValueError, match=r"adapter: found .*none.*, allowed is a folder with adapter_config.json"):
        Source(plain, tmp_path / "none")


def test_an_adapter_merges_into_a_quantized_base(plain: Path, adapter: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "fp8", "fp8")
    base, merged = Source(tmp_path / "fp8"), Source(tmp_path / "fp8", adapter)
    bases, both = Source(plain), Source(plain, adapter)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    update = both.read(name) - bases.read(name)
    assert update.abs().max() > 0.01
    assert relative_error(merged.read(name) - base.read(name).float(), update) < 1e-5
