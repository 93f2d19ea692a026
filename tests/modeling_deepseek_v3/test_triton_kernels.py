"""The whole model on the Triton kernels, in Triton's interpreter or on a GPU, against the plain torch path."""

import os

import pytest
import torch
from transformers import DynamicCache, StaticCache

from deepseek_v3.kernels.dispatch import kernels
from tests.modeling_deepseek_v3.helpers import build, gradients, relative_error, tiny_config, tokens

DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
if DEVICE == "cpu":
    from tests.kernels import interpreter_bf16  # noqa: F401

# The kernels want powers of two of at least 16 from the attention.
SIZES = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "kv_lora_rank": 32, "q_lora_rank": 24}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4}
SIZES |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
OPS = {
    "rms_norm",
    "rms_norm_backward",
    "rope_in_place",
    "rope",  # in backward
    "route",
    "route_backward",
    "grouped_swiglu_experts",
    "grouped_swiglu_experts_backward",
    "linear_cross_entropy",
}


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    """Which of our ops ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deepseek_v3":
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def training_step(model, mode: str, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[str]]:
    model.zero_grad()
    with kernels(mode), Called() as called:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    return loss.detach(), gradients(model), called.names


@pytest.mark.parametrize("attention", ["sdpa", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_equals_the_reference(dtype: torch.dtype, attention: str) -> None:
    """Padding, packed documents, MTP and balance loss large enough to be seen in every gradient."""
    config = tiny_config(**SIZES, seq_balance_coef=0.5, mtp_loss_coef=0.7)
    model = build(config, attn_implementation=attention).to(DEVICE, dtype).train()
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 12:] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    inputs["position_ids"] = torch.cat((torch.arange(5), torch.arange(9))).expand(2, 14)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    loss, found, called = training_step(model, "triton", **inputs)
    expected_loss, expected, _ = training_step(model, "reference", **inputs)
    assert called >= OPS | ({"mla_attention", "mla_attention_backward"} if attention == "deepseek_v3" else set())
    assert found.keys() == expected.keys()
    if dtype == torch.float32:
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        for name, gradient in found.items():
            assert relative_error(gradient, expected[name]) < 2e-5, name
        return
    # Two roundings of the same model: neither is nearer to fp32 than the other.
    exact_loss, exact, _ = training_step(model.float(), "reference", **inputs)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.01)
    assert distance(found, exact) < 1.3 * distance(expected, exact) < 0.1


@pytest.mark.parametrize("attention", ["sdpa", "deepseek_v3"])
def test_autocast_is_as_close_to_fp32_as_the_reference_is(attention: str) -> None:
    """Projections are bf16 there, the residual stream fp32: rounded in every layer, it would be twice as far."""
    config = tiny_config(**SIZES | {"num_hidden_layers": 3, "num_nextn_predict_layers": 0})
    model = build(config, attn_implementation=attention).to(DEVICE)
    ids = tokens(1, 12).to(DEVICE)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)  # a stream that is large beside what the layers add
        exact, errors = model(ids).logits, {}
        for mode in ("triton", "reference"):
            with kernels(mode), torch.autocast(DEVICE, torch.bfloat16):
                errors[mode] = (model(ids).logits - exact).norm()
    assert errors["triton"] < 1.2 * errors["reference"]


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative error of all gradients together, in the Frobenius norm."""
    difference = sum((found[name].double() - exact[name].double()).square().sum() for name in exact)
    return (difference / sum(gradient.double().square().sum() for gradient in exact.values())).sqrt().item()


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("attention", ["sdpa", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_steps_equal_the_reference(dtype: torch.dtype, attention: str, cache_class: type) -> None:
    """Prefill, one token, then three as a draft's check; one row padded on the left."""
    model = build(tiny_config(**SIZES), attn_implementation=attention).to(DEVICE, dtype)
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(mode: str) -> tuple[torch.Tensor, set[str]]:
        options = {"max_cache_len": 20} if cache_class is StaticCache else {}
        cache, parts, done = cache_class(config=model.config, **options), [], 0
        with kernels(mode), torch.no_grad(), Called() as called:
            for size in (10, 1, 3):
                place = slice(done, done + size)
                done += size
                inputs = {"attention_mask": mask[:, :done], "position_ids": positions[:, place]}
                parts.append(model(ids[:, place], **inputs, past_key_values=cache).logits)
        return torch.cat(parts, dim=1)[mask.bool()], called.names

    found, called = logits("triton")
    expected, _ = logits("reference")
    assert called >= {"rms_norm", "rope_in_place", "route", "grouped_swiglu_experts", "mla_decode"}
    if cache_class is DynamicCache:  # a static one is longer than the prompt, and absorption is cheaper at these sizes
        assert ("mla_attention" in called) == (attention == "deepseek_v3")
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("sizes", [{"qk_rope_head_dim": 8}, {"kv_lora_rank": 48}], ids=str)
def test_widths_that_the_decode_kernel_does_not_take_are_expanded(sizes: dict[str, int]) -> None:
    model = build(tiny_config(**SIZES | sizes), attn_implementation="sdpa").to(DEVICE)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 3}
    with kernels("triton"), Called() as called:
        text = model.generate(tokens(1, 6).to(DEVICE), **options)
    assert "rope_in_place" in called.names and "mla_decode" not in called.names
    with kernels("reference"):
        assert torch.equal(model.generate(tokens(1, 6).to(DEVICE), **options), text)


@pytest.mark.parametrize("trained", ["q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa"])
def test_gradients_on_a_cached_prefix(trained: str) -> None:
    """Of the first layer's attention alone, so that what else enters the attention needs none."""
    model = build(tiny_config(**SIZES), attn_implementation="sdpa").to(DEVICE).requires_grad_(False)
    weight = getattr(model.model.layers[0].self_attn, trained).weight.requires_grad_()
    ids, found = tokens(1, 10).to(DEVICE), {}
    for mode in ("triton", "reference"):
        cache = DynamicCache(config=model.config)
        with kernels("reference"), torch.no_grad():
            model(ids[:, :8], past_key_values=cache)
        with kernels(mode):
            model(ids[:, 8:], past_key_values=cache).logits.square().sum().backward()
        found[mode], weight.grad = weight.grad, None
    assert relative_error(found["triton"], found["reference"]) < 2e-5
