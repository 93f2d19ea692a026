"""The model against transformers' own DeepSeek-V3 with the same weights: outputs, every gradient, generated text."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm as StockRMSNorm

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.modeling_deepseek_v3 import DeepseekV3Model
from deepseek_v3.modeling_deepseek_v3.layers import DeepseekV3RMSNorm
from tests.modeling_deepseek_v3.helpers import (
    YARN,
    assert_same_gradients,
    build,
    gradients,
    relative_error,
    stock_twin,
    tiny_config,
    tokens,
)

ARCHITECTURES = {
    "preset": {},
    "dense only": {"first_k_dense_replace": 3},
    "moe only": {"first_k_dense_replace": 0},
    "one group": {"n_group": 1, "topk_group": 1},
    "one of two groups": {"n_group": 2, "topk_group": 1},
    "groups without limit": {"n_group": 4, "topk_group": 4},
    "weights not normalised": {"norm_topk_prob": False},
    "two shared experts": {"n_shared_experts": 2},
    "without q_lora": {"q_lora_rank": None},
    "rope in halves": {"rope_interleave": False},
    "attention bias": {"attention_bias": True},
    "attention bias without q_lora": {"attention_bias": True, "q_lora_rank": None},
    "value wider than key": {"v_head_dim": 40},
    "tied embeddings": {"tie_word_embeddings": True},
    "large eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn of the 671B model": {"rope_parameters": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn without mscale": {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
    "yarn in halves": {"rope_parameters": YARN, "rope_interleave": False},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        "max_position_embeddings": 16,
    },
}


def logits_and_gradients(model, probe, **inputs):
    logits = model(**inputs, use_cache=False).logits
    (logits * probe).sum().backward()
    return logits.detach(), gradients(model)


def without_mtp(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert not [name for name in found if name.startswith("model.layers.3.")], "MTP layers got a gradient from logits"
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_all_gradients_equal_stock(name: str, attention: str) -> None:
    """Right-padded rows of different length, more positions than YaRN's original length."""
    model = build(tiny_config(**ARCHITECTURES[name]), attn_implementation=attention).train()
    stock = stock_twin(model).train()
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 19:] = 0
    inputs = {"input_ids": tokens(2, 24), "attention_mask": mask}
    probe = torch.randn(2, 24, 97, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    ours, our_gradients = logits_and_gradients(model, probe, **inputs)
    theirs, their_gradients = logits_and_gradients(stock, probe, **inputs)
    real = mask.bool()
    assert relative_error(ours[real], theirs[real]) < 3e-6
    assert_same_gradients(without_mtp(our_gradients), their_gradients, 2e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["preset", "moe only", "without q_lora", "yarn", "rope in halves", "tied embeddings"])
def test_equal_to_stock_in_double_precision(name: str, attention: str) -> None:
    """Both keep norms and router in fp32, so their results are not exact to 1e-16, but they are the same results."""
    config = tiny_config(**ARCHITECTURES[name])
    model = build(config, attn_implementation=attention, experts_implementation="eager").double()
    stock = stock_twin(model)
    probe = torch.randn(2, 20, 97, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, our_gradients = logits_and_gradients(model, probe, input_ids=tokens(2, 20))
    theirs, their_gradients = logits_and_gradients(stock, probe, input_ids=tokens(2, 20))
    assert ours.dtype == torch.float64
    assert relative_error(ours, theirs) < 1e-9
    assert_same_gradients(without_mtp(our_gradients), their_gradients, 2e-6)


def test_cross_entropy_and_its_gradients_equal_stock() -> None:
    model = build(tiny_config(num_nextn_predict_layers=0, seq_balance_coef=0.0)).train()
    stock = stock_twin(model).train()
    labels = tokens(2, 20)
    labels[0, 5:9] = -100
    ours, theirs = model(input_ids=tokens(2, 20), labels=labels), stock(input_ids=tokens(2, 20), labels=labels)
    ours.loss.backward()
    theirs.loss.backward()
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert ours.logits is None
    assert_same_gradients(gradients(model), gradients(stock), 2e-5)


def test_hidden_states_attentions_and_router_logits_equal_stock() -> None:
    model = build()
    stock = stock_twin(model)
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad():
        ours, theirs = model(tokens(2, 12), **asked), stock(tokens(2, 12), **asked)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for field in ("hidden_states", "attentions", "router_logits"):
        pairs = zip(getattr(ours, field), getattr(theirs, field), strict=True)
        assert all(relative_error(a, b) < 3e-6 for a, b in pairs), field


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_is_as_close_to_fp32_as_stock_is(attention: str) -> None:
    model = build(attn_implementation=attention)
    with torch.no_grad():
        exact = model(tokens(4, 32)).logits
        model, stock = model.bfloat16(), stock_twin(model).bfloat16()
        ours, theirs = model(tokens(4, 32)).logits.float(), stock(tokens(4, 32)).logits.float()
    assert ours.dtype == torch.float32 and model(tokens(1, 4)).logits.dtype == torch.bfloat16
    # the median, because one changed expert choice moves a whole token
    error, stock_error = (ours - exact).abs().median(), (theirs - exact).abs().median()
    assert 0 < error < 1.3 * stock_error


@pytest.mark.parametrize("attention", ["eager", "deepseek_v3"])
def test_bf16_autocast_training_is_as_close_to_fp32_as_stock_is(attention: str) -> None:
    config = tiny_config(num_nextn_predict_layers=0, seq_balance_coef=0.0)
    model = build(config, attn_implementation=attention).train()
    stock = stock_twin(model).train()
    inputs = {"input_ids": tokens(4, 24), "labels": tokens(4, 24), "use_cache": False}
    model(**inputs).loss.backward()
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(**inputs).loss, stock(**inputs).loss
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=0.01)
    found, expected = gradients(model), gradients(stock)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert found[name].dtype == torch.float32
        assert (found[name] - exact[name]).norm() < 1.5 * (expected[name] - exact[name]).norm(), name


@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
def test_autocast_leaves_double_precision_alone(attention: str) -> None:
    model = build(attn_implementation=attention).double()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(tokens(1, 6)).logits
    assert relative_error(found, model(tokens(1, 6)).logits) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
def test_rms_norm_equals_stock_and_leaves_its_input_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = DeepseekV3RMSNorm(32, eps=0.01).to(dtype), StockRMSNorm(32, eps=0.01).to(dtype)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    x, probe = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        output = norm(leaf)
        output.backward(probe)
        assert torch.equal(leaf, x)
        results.append((output, leaf.grad, norm.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        assert relative_error(found, expected) < (0.02 if dtype == torch.bfloat16 else 1e-6)


EXPERTS = ["deepseek_v3", "grouped_mm", "batched_mm", "eager"]


def test_default_experts_implementation_is_ours() -> None:
    assert DeepseekV3ForCausalLM(tiny_config()).config._experts_implementation == "deepseek_v3"


def test_experts_implementations_agree() -> None:
    results = {}
    probe = torch.randn(2, 24, 97, generator=torch.Generator().manual_seed(2))
    for name in EXPERTS:
        model = build(tiny_config(), experts_implementation=name)
        assert model.config._experts_implementation == name
        results[name] = logits_and_gradients(model, probe, input_ids=tokens(2, 24))
    logits, expected = results["eager"]
    for name in EXPERTS[:3]:
        assert relative_error(results[name][0], logits) < 3e-6, name
        assert_same_gradients(results[name][1], expected, 2e-5)


@pytest.mark.parametrize("name", EXPERTS)
def test_set_experts_implementation_switches_at_run_time(name: str, monkeypatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    called = []
    for other in EXPERTS[:3]:
        function = ALL_EXPERTS_FUNCTIONS[other]
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS._global_mapping,
            other,
            lambda *args, _function=function, _other=other, **kw: (called.append(_other), _function(*args, **kw))[1],
        )
    model = build()
    model.set_experts_implementation(name)
    model(tokens(1, 4))
    assert called == ([] if name == "eager" else [name] * 2)  # two MoE layers


@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
@pytest.mark.parametrize("name", ["preset", "yarn", "without q_lora"])
def test_greedy_text_equals_stock(name: str, attention: str) -> None:
    """From left-padded prompts, so the cached and the uncached pass both count."""
    model = build(tiny_config(**ARCHITECTURES[name]), attn_implementation=attention)
    model.generation_config.eos_token_id = None
    stock = stock_twin(model)
    stock.generation_config.eos_token_id = None
    prompt, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    ours, theirs = model.generate(prompt, **arguments), stock.generate(prompt, **arguments)
    assert ours.shape == (3, 27)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
def test_packed_documents_equal_separate_ones(attention: str, with_mask: bool, use_cache: bool | None) -> None:
    """`position_ids` that restart separate documents, whatever else is passed, and in the gradients too."""
    model = build(tiny_config(rope_parameters=YARN), attn_implementation=attention).train()
    documents = [tokens(1, 9, seed=3), tokens(1, 14, seed=4), tokens(1, 5, seed=5)]
    probe = torch.randn(1, 28, 97, generator=torch.Generator().manual_seed(2))

    logits = torch.cat([model(document, use_cache=use_cache).logits for document in documents], dim=1)
    (logits * probe).sum().backward()
    expected = gradients(model)

    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    mask = {"attention_mask": torch.ones(1, 28, dtype=torch.long)} if with_mask else {}
    packed = model(torch.cat(documents, dim=1), position_ids=position_ids, use_cache=use_cache, **mask).logits
    (packed * probe).sum().backward()
    assert relative_error(packed, logits) < 3e-6
    assert_same_gradients(gradients(model), expected, 2e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    """With MTP and balance loss large enough to be seen in every gradient."""
    config = tiny_config(num_nextn_predict_layers=2, seq_balance_coef=0.5, mtp_loss_coef=0.7)
    model = build(config).train()
    inputs = {"input_ids": tokens(2, 16), "labels": tokens(2, 16), "use_cache": False}
    plain = model(**inputs)
    plain.loss.backward()
    expected = gradients(model)
    assert all(name in expected for name, _ in model.named_parameters())

    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again = model(**inputs)
    again.loss.backward()
    assert len(calls) == 2 * 5, "every layer, MTP layers included, has to run again in backward"
    for field in ("loss", "ce_loss", "mtp_loss", "balance_loss"):
        assert getattr(again, field).item() == pytest.approx(getattr(plain, field).item(), rel=1e-6), field
    assert_same_gradients(gradients(model), expected, 1e-6)


def test_checkpointing_reaches_adapters_behind_a_frozen_embedding() -> None:
    """Re-entrant checkpointing gives no gradient when no input of a layer needs one."""
    model = build().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn.o_proj" in name)
    model(input_ids=tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss.backward()
    assert len(gradients(model)) == 4  # three layers and the MTP layer


@pytest.mark.parametrize("cls", [DeepseekV3ForCausalLM, DeepseekV3Model])
def test_router_logits_are_asked_for_by_argument_or_configuration(cls) -> None:
    model = build(cls=cls)
    assert model(tokens(1, 4)).router_logits is None
    assert len(model(tokens(1, 4), output_router_logits=True).router_indices) == 2
    model.config.output_router_logits = True
    assert len(model(tokens(1, 4)).router_logits) == 2
    assert model(tokens(1, 4), output_router_logits=False).router_logits is None


def test_compiled_forward_and_backward_equal_eager() -> None:
    torch._dynamo.reset()
    config = tiny_config(num_hidden_layers=2, seq_balance_coef=0.5)
    model = build(config, attn_implementation="sdpa").train()
    inputs = {"input_ids": tokens(2, 12), "labels": tokens(2, 12), "use_cache": False}
    plain = model(**inputs)
    plain.loss.backward()
    expected = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    again = compiled(**inputs)
    again.loss.backward()
    assert again.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert_same_gradients(gradients(model), expected, 1e-5)


def test_base_model_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model = build(tiny_config(num_hidden_layers=2), cls=DeepseekV3Model, attn_implementation="sdpa")
    expected = model(tokens(2, 12), use_cache=False).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(tokens(2, 12), use_cache=False).last_hidden_state, expected) < 1e-6


@pytest.mark.parametrize("cached", [DynamicCache, StaticCache])
def test_training_behind_a_cached_prefix_with_padding(cached: type) -> None:
    """`attention_mask` then begins with the prefix; losses, gradients and counts are those of the new tokens."""
    config = tiny_config(num_nextn_predict_layers=0, seq_balance_coef=1e-9)  # computed, and too small to see
    model = build(config, attn_implementation="sdpa").train()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = 0
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)[:, 6:]
    twin = stock_twin(model).train()
    losses, gradients = [], []
    for each in (model, twin):
        cache = cached(config=config, **({"max_cache_len": 12} if cached is StaticCache else {}))
        with torch.no_grad():
            each(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        output = each(ids[:, 6:], attention_mask=mask, past_key_values=cache, labels=labels, use_cache=True)
        (gradient,) = torch.autograd.grad(output.loss, each.get_parameter("model.layers.1.self_attn.o_proj.weight"))
        losses, gradients = [*losses, output.loss.detach()], [*gradients, gradient]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert relative_error(*gradients) < 1e-4
    counts = model.model.layers[1].mlp.gate.load_counts
    assert counts.sum() == mask[:, 6:].sum() * config.num_experts_per_tok
