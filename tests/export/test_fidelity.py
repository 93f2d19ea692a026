"""The figures of `verify`, against the same computed plainly from logits of transformers' own model in fp64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.evaluation.text import TextRows, read_text, text_rows
from deepseek_v3.export.fidelity import (
    KINDS,
    compare_logits,
    coverage,
    first_non_finite,
    reference_states,
    tensor_errors,
    tensor_kind,
)
from deepseek_v3.modeling_deepseek_v3.checkpoint import tensor_shapes
from tests.evaluation.helpers import tiny_model, tiny_tokenizer, write_text
from tests.modeling_deepseek_v3.helpers import stock_twin, tiny_config


class InMemory:
    """What `fidelity.Tensors` asks for, of a dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.names, self.config = tensors, list(tensors), tiny_config()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()

    def is_quantized(self, name: str) -> bool:
        return ".mlp.experts." in name and "layers.3" not in name


def official(seed: int = 0) -> dict[str, torch.Tensor]:
    config = tiny_config()
    shapes = tensor_shapes(config, mtp=True) | {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TextRows:
    source = write_text(tmp_path_factory.mktemp("text") / "corpus")
    return text_rows(read_text(source), tiny_tokenizer(), length=32, rows=20)


@torch.no_grad()
def test_every_figure_equals_the_plain_computation(rows: TextRows) -> None:
    model, other = tiny_model(), tiny_model()
    for parameter in other.parameters():
        parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))
    found = compare_logits(other, reference_states(model, rows), rows)

    kl, same, before, after, tokens = [], [], [], [], []
    stock, stock_other = stock_twin(model).double(), stock_twin(other).double()
    for row in rows.chosen:
        one = rows.dataset[int(row)]
        keep = one["labels"][1:] != -100
        label = one["labels"][1:][keep]
        p = stock(one["input_ids"][None]).logits[0, :-1][keep].log_softmax(-1)
        q = stock_other(one["input_ids"][None]).logits[0, :-1][keep].log_softmax(-1)
        kl.append(float(F.kl_div(q, p, reduction="sum", log_target=True)))
        same.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
        before.append(float(F.nll_loss(p, label, reduction="sum")))
        after.append(float(F.nll_loss(q, label, reduction="sum")))
        tokens.append(int(keep.sum()))
    n_bytes = sum(tokens) * rows.bytes_per_token
    assert found["kl"]["value"] == pytest.approx(sum(kl) / sum(tokens), rel=1e-4)
    assert found["kl"]["value"] > 0.001
    assert found["top1"]["value"] == pytest.approx(sum(same) / sum(tokens), abs=2 / sum(tokens))
    bits = found["bits_per_byte"]
    assert bits["reference"]["value"] == pytest.approx(sum(before) / math.log(2) / n_bytes, rel=1e-5)
    assert bits["delta"]["value"] == pytest.approx((sum(after) - sum(before)) / math.log(2) / n_bytes, rel=1e-3)
    assert bits["export"]["value"] == pytest.approx(bits["reference"]["value"] + bits["delta"]["value"])
    perplexities = [math.exp(sum(nats) / sum(tokens)) for nats in (before, after)]
    assert found["perplexity_change"]["value"] == pytest.approx(perplexities[1] / perplexities[0] - 1, rel=1e-3)
    assert all(found[name]["n"] == len(rows.chosen) for name in ("kl", "top1", "perplexity_change"))


def test_a_model_is_equal_to_itself(rows: TextRows) -> None:
    model = tiny_model()
    found = compare_logits(model, reference_states(model, rows), rows)
    assert found["kl"]["value"] == 0 and found["top1"]["value"] == 1
    assert found["bits_per_byte"]["delta"] == {"value": 0, "low": 0, "high": 0, "n": len(rows.chosen)}


@torch.no_grad()
def test_the_module_where_infinity_arises_is_named(rows: TextRows) -> None:
    model = tiny_model()
    states = reference_states(model, rows)
    model.model.layers[1].mlp.shared_experts.up_proj.weight.fill_(3e38)
    found = compare_logits(model, states, rows)
    assert found == {"non_finite": "model.layers.1.mlp.shared_experts.up_proj"}
    assert first_non_finite(tiny_model(), rows.dataset[0]["input_ids"][None]) == "lm_head"
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_a_head_that_is_damaged_beyond_measure_has_figures(rows: TextRows) -> None:
    model = tiny_model()
    states = reference_states(model, rows)
    other = tiny_model()
    other.lm_head.weight.mul_(1e5)
    found = compare_logits(other, states, rows)
    assert found["bits_per_byte"]["delta"]["value"] * rows.bytes_per_token > 1e4  # e to that power is no float
    for figure in (found["kl"], found["perplexity_change"]):
        assert 1e3 < figure["low"] <= figure["value"] <= figure["high"] < math.inf
    assert found["perplexity_change"]["n"] == len(rows.chosen)
    other.lm_head.weight.mul_(1e33)  # finite logits, whose differences are not
    assert compare_logits(other, states, rows) == {"non_finite": "lm_head"}


def test_every_official_tensor_has_a_kind() -> None:
    config = tiny_config()
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in official():
        kinds[tensor_kind(name, config)].append(name)
    first, last = config.first_k_dense_replace, config.num_hidden_layers
    experts = (last - first) * config.n_routed_experts * 3
    assert len(kinds["routed experts"]) == experts and all(".mlp.experts." in name for name in kinds["routed experts"])
    assert len(kinds["dense MLP"]) == 3 * first and len(kinds["shared experts"]) == 3 * (last - first)
    assert len(kinds["router"]) == 2 * (last - first) and len(kinds["attention"]) == 5 * last
    assert len(kinds["norms"]) == 4 * last + 1
    assert kinds["embeddings"] == ["model.embed_tokens.weight"] and kinds["head"] == ["lm_head.weight"]
    assert all(f".layers.{last}." in name for name in kinds["MTP"] + kinds["MTP norms"])
    assert f"model.layers.{last}.eh_proj.weight" in kinds["MTP"]
    assert {name.split(".", 3)[3] for name in kinds["MTP norms"]} == {
        *("enorm.weight", "hnorm.weight", "shared_head.norm.weight", "input_layernorm.weight"),
        *("post_attention_layernorm.weight", "self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"),
        "mlp.gate.e_score_correction_bias",
    }


def test_tensor_errors_are_relative_norms_by_kind() -> None:
    before = official()
    after = {name: tensor.clone() for name, tensor in before.items()}
    first, second = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.2.mlp.experts.5.down_proj.weight"
    after[first] += 0.5
    after[second] *= 1.25
    errors, broken = tensor_errors(InMemory(after), InMemory(before), before)
    assert not broken
    experts = [name for name in before if tensor_kind(name, tiny_config()) == "routed experts"]
    size = sum(float(before[name].double().square().sum()) for name in experts)
    wrong = 0.25 * before[first].numel() + 0.0625 * float(before[second].double().square().sum())
    row = errors["routed experts"]
    assert row["relative_error"] == pytest.approx(math.sqrt(wrong / size), rel=1e-5)
    assert row["largest_tensor"] == first
    own = 0.5 * math.sqrt(before[first].numel()) / float(before[first].norm())
    assert row["largest"] == pytest.approx(own, rel=1e-5)
    assert row["largest_plain"] == -1 and "largest_plain_tensor" not in row  # all of them count as quantized
    assert row["parameters"] == sum(before[name].numel() for name in experts)
    assert all(errors[kind]["relative_error"] == 0 for kind in errors if kind != "routed experts")
    assert sum(row["tensors"] for row in errors.values()) == len(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_named(value: float) -> None:
    before = official()
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["model.layers.2.self_attn.o_proj.weight"][3, 1] = value
    errors, broken = tensor_errors(InMemory(after), InMemory(before), before)
    assert broken == ["model.layers.2.self_attn.o_proj.weight"]
    assert errors["attention"]["relative_error"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_no_reference(value: float) -> None:
    """Whether the export repeats it or not."""
    before = official()
    after = {name: tensor.clone() for name, tensor in before.items()}
    before["model.layers.2.self_attn.o_proj.weight"][3, 1] = value
    for export in (after, before):
        with pytest.raises(ValueError, match="o_proj.weight of the reference: found numbers that are not finite"):
            tensor_errors(InMemory(export), InMemory(before), before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.layers.1.mlp.shared_experts.up_proj", "lm_head"])
def test_a_reference_whose_numbers_overflow_is_no_reference(rows: TextRows, name: str) -> None:
    model = tiny_model()
    model.get_submodule(name).weight.fill_(3e38)
    with pytest.raises(ValueError, match=f"the reference's logits are not finite, from {name} on"):
        reference_states(model, rows)


def test_coverage_tells_names_and_shapes() -> None:
    before = official()
    after = {name: tensor for name, tensor in before.items() if "layers.3" not in name}
    after["model.norm.weight"] = torch.ones(7)
    after["model.extra.weight"] = torch.ones(1)
    found = coverage(InMemory(after), InMemory(before))
    assert found["missing"] == [name for name in before if "layers.3" in name]
    assert found["unexpected"] == ["model.extra.weight"]
    assert found["other_shape"] == [f"model.norm.weight: [7], not [{tiny_config().hidden_size}]"]
    assert found["tensors"] == len(before) - len(found["missing"])


def test_intervals_of_a_difference_come_from_the_same_rows(rows: TextRows) -> None:
    """The interval of the difference is far narrower than that of either figure: rows are paired."""
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(1 + 0.01 * torch.randn(other.lm_head.weight.shape))
    bits = compare_logits(other, reference_states(model, rows), rows)["bits_per_byte"]
    widths = {name: figure["high"] - figure["low"] for name, figure in bits.items()}
    assert widths["delta"] < 0.2 * widths["reference"] and np.isfinite(widths["delta"])


def test_states_are_kept_in_little_memory(rows: TextRows, tmp_path: Path) -> None:
    model = tiny_model()
    kept = reference_states(model, rows)
    assert kept.states.shape == (20, 32, model.config.hidden_size) and kept.head is model.lm_head
