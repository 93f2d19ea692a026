"""The walk through the layers against transformers' own model, which sees the same text with the same weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Tokenizer
from deepseek_v3.data import load_corpus
from deepseek_v3.export import Source, calibration
from deepseek_v3.export.calibration import Calibration, calibration_rows
from deepseek_v3.export.compressed import chosen_weights
from deepseek_v3.export.gptq import search_scales, spread
from deepseek_v3.tokenization import train_tokenizer
from tests.modeling_deepseek_v3.helpers import build, relative_error, stock_twin, tiny_config, tokens

LENGTH = 24
SIZES = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 64}
SIZES |= {"qk_nope_head_dim": 16, "v_head_dim": 32, "moe_intermediate_size": 32, "n_routed_experts": 8}


def rows() -> dict[str, torch.Tensor]:
    """Four rows, one of them two documents."""
    positions = torch.arange(LENGTH).repeat(4, 1)
    positions[2, 10:] -= 10
    return {"input_ids": tokens(4, LENGTH), "position_ids": positions}


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    return build(tiny_config(**SIZES))


@pytest.fixture(scope="module")
def source(model: DeepseekV3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("calibration")
    model.save_pretrained(folder)
    return Source(folder)


def no_quantizer(moment: torch.Tensor):
    raise AssertionError("nothing is to be quantized")


def round_fit(moments: list[torch.Tensor]):
    """Rounds to nearest, and keeps the moments it is given."""

    def fit(moment: torch.Tensor):
        moments.append(moment)

        def quantize(weight: torch.Tensor):
            scale = search_scales(weight, 32)
            return (weight.float() / spread(scale, weight.shape[1])).round().clamp(-8, 7), scale

        return quantize

    return fit


@pytest.mark.parametrize("chunk", [8192, 40, 7])
def test_activations_are_those_of_transformers(source, model, chunk, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", chunk)
    twin, walk = stock_twin(model), Calibration(source, rows(), [], no_quantizer)
    inputs: list[torch.Tensor] = []
    for layer in twin.model.layers:
        layer.register_forward_hook(lambda module, args, output: inputs.append(output.detach()))
    with torch.no_grad():
        twin.model(**rows(), use_cache=False)
    for expected in inputs:
        assert relative_error(walk.advance(), expected) < 1e-5


@torch.no_grad()
def test_every_weight_is_calibrated_on_what_the_quantized_model_gives_it(source, model) -> None:
    """Transformers' model with the quantized weights, run once on the text: the moments of the linear layers' inputs
    there, with every expert shown all tokens, are those that the weights were quantized with."""
    names, moments = chosen_weights(source, "linears"), []
    walk = Calibration(source, rows(), names, round_fit(moments))
    found = {name: walk.take(name) for name in names}
    assert all(codes.dtype == torch.int8 and scale.dtype == torch.bfloat16 for codes, scale in found.values())

    twin = stock_twin(model)
    for name, (codes, scale) in found.items():
        weight = codes.float() * spread(scale, codes.shape[1])
        if ".experts." not in name:
            twin.get_parameter(name).copy_(weight)
            continue
        prefix, _, rest = name.partition(".experts.")
        expert, projection, _ = rest.split(".")
        experts = twin.get_submodule(f"{prefix}.experts")
        if projection == "down_proj":
            experts.down_proj[int(expert)] = weight
        else:
            experts.gate_up_proj[int(expert)].chunk(2)[projection == "up_proj"].copy_(weight)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)) if args else None
        )
    twin.model(**rows(), use_cache=False)

    def expected():
        for index, layer in enumerate(twin.model.layers):
            prefix = f"model.layers.{index}."
            yield from (inputs[f"{prefix}self_attn.{name}"] for name in ("q_a_proj", "q_b_proj", "o_proj"))
            x = inputs[f"{prefix}mlp"]
            yield x
            if index == 0:
                yield inputs[f"{prefix}mlp.down_proj"]
                continue
            yield inputs[f"{prefix}mlp.shared_experts.down_proj"]
            for gate_up in layer.mlp.experts.gate_up_proj:
                gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
                yield F.silu(gate) * up

    inputs_in_order = list(expected())
    assert len(moments) == len(inputs_in_order)  # q_a with kv_a, gate with up of all experts: one each
    for moment, x in zip(moments, inputs_in_order, strict=True):
        assert relative_error(moment, x.t() @ x) < 1e-4


def test_experts_alone_leave_the_rest(source) -> None:
    names, moments = chosen_weights(source, "experts"), []
    walk = Calibration(source, rows(), names, round_fit(moments))
    for name in names:
        walk.take(name)
    each_layer = 1 + SIZES["n_routed_experts"]  # all experts' gate and up, and each expert's down
    assert len(moments) == 2 * each_layer


def test_goes_on_anywhere(source) -> None:
    """What an interrupted export asks for first is what it would have got in turn."""
    names = chosen_weights(source, "linears")
    walk = Calibration(source, rows(), names, round_fit([]))
    whole = {name: walk.take(name) for name in names}
    left = names[-20:]
    again = Calibration(source, rows(), names, round_fit([]))
    for name in left:
        for found, expected in zip(again.take(name), whole[name], strict=True):
            assert torch.equal(found, expected)


def test_activations_that_are_not_finite(source) -> None:
    def fit(moment):
        return lambda weight: (torch.full_like(weight, torch.inf), weight[:, ::32])

    walk = Calibration(source, rows(), chosen_weights(source, "experts"), fit)
    walk.advance()
    with pytest.raises(ValueError, match=r"model\.layers\.1: its output .* not finite"):
        walk.advance()


def test_a_weight_that_is_not_finite(source, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an expert that no token may choose, so that the layer's output does not show it."""
    name, read = "model.layers.1.mlp.experts.3.down_proj.weight", Source.read
    monkeypatch.setattr(Source, "read", lambda self, n: read(self, n) * (torch.nan if n == name else 1))
    walk = Calibration(source, rows(), chosen_weights(source, "experts"), round_fit([]))
    with pytest.raises(ValueError, match=f"{name}: found numbers that are not finite"):
        walk.take(name)


def test_token_that_the_model_lacks(source) -> None:
    text = rows()
    text["input_ids"][0, 0] = 97
    with pytest.raises(ValueError, match="its tokenizer gives id 97, allowed are ids below 97"):
        Calibration(source, text, [], no_quantizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of forty documents, each of a word of its own, and a folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"w{i:02}x " * 60)
    train_tokenizer([f"w{i:02}x " * 3 for i in range(40)], 380).save_pretrained(folder)
    return folder


def test_rows_are_training_text_chosen_by_the_seed(texts: Path) -> None:
    corpus = str(texts / "corpus")
    chosen, record = calibration_rows(texts, corpus, 6, 32, 0)
    assert chosen["input_ids"].shape == chosen["position_ids"].shape == (6, 32)
    assert record == {
        "text": corpus, "sha256": load_corpus(corpus).sha256, "licence": None, "rows": 6, "length": 32, "seed": 0,
    }  # fmt: skip
    calibration_rows.cache_clear()
    assert torch.equal(calibration_rows(texts, corpus, 6, 32, 0)[0]["input_ids"], chosen["input_ids"])
    others = [calibration_rows(texts, corpus, 6, 32, seed)[0]["input_ids"] for seed in range(1, 12)]
    assert not any(torch.equal(other, chosen["input_ids"]) for other in others)

    tokenizer = DeepseekV3Tokenizer.from_pretrained(texts)
    seen = "".join(tokenizer.batch_decode(torch.cat(others)))
    held = [document.text.split()[0] for document in load_corpus(corpus).heldout]
    assert held and not any(word in seen for word in held)
    assert sum(document.text.split()[0] in seen for document in load_corpus(corpus).train) > 20


def test_too_little_text_and_no_tokenizer(texts: Path) -> None:
    with pytest.raises(ValueError, match="calibration: .* allowed are at least 12800000"):
        calibration_rows(texts, str(texts / "corpus"), 50000, 256, 0)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        calibration_rows(None, "stdlib", 1, 32, 0)
