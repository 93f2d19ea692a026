"""The official layout: read by stock transformers, complete with MTP, in every plain dtype and from every class."""

from pathlib import Path

import pytest
import torch

from deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)
from deepseek_v3.export import export
from tests.export.helpers import config_json, read_tensors, write_checkpoint
from tests.modeling_deepseek_v3.helpers import build, run_python, tiny_config, tokens

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
logits = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models.deepseek_v3"), type(model)
    ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    logits.append(model(ids).logits)
assert not any(name.startswith("deepseek_v3") for name in sys.modules)
print(*(torch.equal(logits[0], each) for each in logits), logits[0].std().item() > 0.1)
"""


def test_stock_transformers_computes_the_same_logits(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "one", "bf16", dtype="fp32")
    export(plain, tmp_path / "shards", "bf16", dtype="fp32", max_shard_bytes=60_000)
    assert [len(list((tmp_path / name).glob("*.safetensors"))) for name in ("one", "shards")] == [1, 23]
    folders = map(str, (plain, tmp_path / "one", tmp_path / "shards"))
    assert run_python(STOCK, *folders).split()[-4:] == ["True"] * 4


@pytest.mark.parametrize("dtype, expected", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_every_tensor_is_rounded_once_and_the_routing_bias_never(
    plain: Path, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    report = export(plain, tmp_path, "bf16", dtype=dtype)
    before, after = read_tensors(plain), read_tensors(tmp_path)
    assert before.keys() == after.keys() and any("layers.3.embed_tokens" in name for name in after)  # 3 is MTP
    for name, tensor in before.items():
        wanted = tensor if name.endswith("e_score_correction_bias") else tensor.to(expected)
        assert after[name].dtype == wanted.dtype and torch.equal(after[name], wanted), name
    assert config_json(tmp_path)["dtype"] == str(expected).removeprefix("torch.")
    assert report["quantized"]["share"] == 0


def test_what_save_pretrained_writes_comes_out_byte_for_byte(ragged: Path, tmp_path: Path) -> None:
    export(ragged, tmp_path, "bf16")
    before, after = read_tensors(ragged), read_tensors(tmp_path)
    assert all(before[name].dtype == after[name].dtype for name in before)
    ours = config_json(tmp_path)
    assert ours == config_json(ragged)
    assert {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 4}.items() <= ours.items()


def test_our_own_classes_read_it_with_mtp(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path, "bf16", dtype="fp32")
    ids = tokens(2, 16)
    first, second = (DeepseekV3ForCausalLM.from_pretrained(folder) for folder in (plain, tmp_path))
    assert len(second.mtp_layers) == 1
    a, b = first.train()(ids, labels=ids), second.train()(ids, labels=ids)
    assert a.mtp_loss.item() == b.mtp_loss.item() > 0


@pytest.mark.parametrize("cls", [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification])
def test_classifiers_keep_their_head_and_their_labels(tmp_path: Path, cls: type) -> None:
    labels = {0: "fine", 1: "worse", 2: "bad"}
    source = write_checkpoint(tmp_path / "source", cls=cls, id2label=labels, pad_token_id=0)
    export(source, tmp_path / "out", "bf16", dtype="fp32")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and after["score.weight"].shape == (3, 64)
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = config_json(tmp_path / "out")
    assert config["architectures"] == [cls.__name__] and list(config["id2label"].values()) == list(labels.values())
    cls.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("depth", [0, 2])
def test_a_tied_head_is_not_written_but_its_mtp_copies_are(tmp_path: Path, depth: int) -> None:
    overrides = {"tie_word_embeddings": True, "num_nextn_predict_layers": depth}
    source = write_checkpoint(tmp_path / "source", **overrides)
    export(source, tmp_path / "out", "bf16", dtype="fp32")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert "lm_head.weight" not in after and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum("shared_head.head" in name for name in after) == depth
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out")


def test_experts_that_were_saved_fused_are_written_apart(tmp_path: Path) -> None:
    model = build(tiny_config())
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "apart")
    assert any(name.endswith("gate_up_proj") for name in read_tensors(tmp_path / "fused"))
    export(tmp_path / "fused", tmp_path / "out", "bf16", dtype="fp32")
    expected, found = read_tensors(tmp_path / "apart"), read_tensors(tmp_path / "out")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_number_too_large_for_fp16_is_an_error(tmp_path: Path) -> None:
    model = build(tiny_config())
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.up_proj.weight[0, 0] = 7e4
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.shared_experts\.up_proj\.weight: found 7e\+04, too large"):
        export(tmp_path / "source", tmp_path / "out", "bf16", dtype="fp16")


def test_another_dtype_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype: found 'int8', allowed are bf16, fp16, fp32"):
        export(plain, tmp_path, "bf16", dtype="int8")
