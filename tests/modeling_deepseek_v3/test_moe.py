"""Routing, the routing bias, load counts and the dispatch of tokens to experts."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as StockRouter

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.kernels.experts import torch_impl
from deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from deepseek_v3.modeling_deepseek_v3.moe import DeepseekV3Experts, DeepseekV3MoE
from tests.modeling_deepseek_v3.helpers import (
    build,
    gradients,
    randomize,
    relative_error,
    stock_config,
    tiny_config,
    tokens,
)


def sparse(weights: torch.Tensor, indices: torch.Tensor, experts: int) -> torch.Tensor:
    """`[N, K]` weights and choices as `[N, E]`: the order of the chosen experts is free."""
    return torch.zeros(len(weights), experts).scatter(1, indices, weights)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_equals_stock(groups: tuple[int, int], normalised: bool, dtype: torch.dtype) -> None:
    """Also where the bias outweighs the scores: then negative sums compete, and masked experts must stay out."""
    config = tiny_config(n_group=groups[0], topk_group=groups[1], norm_topk_prob=normalised, routed_scaling_factor=1.7)
    stock = stock_config(config)
    ours, theirs = DeepseekV3TopkRouter(config), StockRouter(stock)
    for bias in (0.0, 0.3, -3.0):
        with torch.no_grad():
            ours.weight.normal_()
            ours.e_score_correction_bias.normal_(bias, 0.5 if bias else 0.0)
        theirs.load_state_dict(ours.state_dict())
        hidden = torch.randn(2, 100, 64).to(dtype)
        logits, weights, indices = ours(hidden)
        expected_logits, expected_weights, expected_indices = theirs(hidden)
        assert logits.dtype == weights.dtype == torch.float32 and indices.dtype == torch.int64
        assert torch.equal(logits, expected_logits)
        assert torch.equal(indices.sort()[0], expected_indices.sort()[0])
        torch.testing.assert_close(sparse(weights, indices, 8), sparse(expected_weights, expected_indices, 8))


def test_bias_decides_the_choice_and_nothing_else() -> None:
    router = DeepseekV3TopkRouter(tiny_config(n_group=1, topk_group=1, routed_scaling_factor=1.0))
    with torch.no_grad():
        router.weight.normal_()
    hidden = torch.randn(50, 64)
    before, _, _ = router(hidden)
    router.e_score_correction_bias[[1, 4, 6]] = 100.0
    logits, weights, indices = router(hidden)
    assert torch.equal(logits, before)
    assert (indices.sort()[0] == torch.tensor([1, 4, 6])).all()
    chosen = logits.sigmoid().gather(1, indices)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True))
    assert weights.std() > 0.01


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
FINE_BIAS = torch.linspace(1.0, 1.001, 8)  # all the same in bf16


def with_fine_bias() -> DeepseekV3ForCausalLM:
    model = build()
    model.get_buffer(BIAS).copy_(FINE_BIAS)
    return model


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.type(torch.bfloat16),
        lambda model: model.double(),
        lambda model: model.bfloat16().float().half(),
    ],
)
def test_bias_stays_fp32_through_casts(cast) -> None:
    model = cast(with_fine_bias())
    assert model.lm_head.weight.dtype != torch.float32
    assert model.get_buffer(BIAS).dtype == torch.float32
    assert torch.equal(model.get_buffer(BIAS), FINE_BIAS)
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if n.endswith("correction_bias"))
    if model.dtype != torch.float64:  # for which torch has no grouped matrix product
        model(tokens(1, 4))


def test_bias_stays_fp32_through_meta_and_back() -> None:
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(tiny_config()).to(torch.bfloat16)
    assert model.get_buffer(BIAS).dtype == torch.float32
    model.to_empty(device="cpu")
    assert model.get_buffer(BIAS).dtype == torch.float32 and model.get_buffer(BIAS).device.type == "cpu"


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_bias_stays_fp32_through_files(dtype, tmp_path) -> None:
    with_fine_bias().to(torch.bfloat16).save_pretrained(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.lm_head.weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert model.get_buffer(BIAS).dtype == torch.float32
    assert torch.equal(model.get_buffer(BIAS), FINE_BIAS)


def test_bias_stays_fp32_through_state_dicts() -> None:
    state = with_fine_bias().bfloat16().state_dict()
    assert state[BIAS].dtype == torch.float32
    for assign in (False, True):
        model = build().bfloat16()
        model.load_state_dict(state, assign=assign)
        assert torch.equal(model.get_buffer(BIAS), FINE_BIAS)
        rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
        model.load_state_dict(rounded, assign=assign)  # a file that holds it in bf16
        assert model.get_buffer(BIAS).dtype == torch.float32


def routers(model) -> list[DeepseekV3TopkRouter]:
    return [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]


def counts(model) -> list[torch.Tensor]:
    found = [router.load_counts for router in routers(model)]
    for router in routers(model):
        router.load_counts = None
    return found


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_each_real_token_is_counted_once(checkpointing) -> None:
    """Two micro-batches, the second padded on both sides; MTP tokens count where they have an input."""
    model = build(tiny_config(num_nextn_predict_layers=2)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:], mask[1, :4] = 0, 0
    rows = tokens(2, 10)
    for attention_mask in (None, mask):
        model(rows, attention_mask=attention_mask, labels=rows, use_cache=False).loss.backward()
    found = counts(model)
    top_k = 3
    main, first, second = (20 + 7 + 6) * top_k, (18 + 6 + 5) * top_k, (16 + 5 + 4) * top_k
    assert [c.sum().item() for c in found] == [main, main, first, second]
    assert all(c.dtype == torch.int64 for c in found)


def test_counts_are_those_of_the_chosen_experts() -> None:
    model = build().train()
    rows = tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    output = model(rows, attention_mask=mask, labels=rows, output_router_logits=True, use_cache=False)
    found = counts(model)
    assert len(output.router_indices) == 2
    for indices, count in zip(output.router_indices, found, strict=False):
        assert torch.equal(torch.bincount(indices[mask.flatten().bool()].flatten(), minlength=8), count)
        assert count.float().std() > 0


def test_nothing_is_counted_in_evaluation_or_without_gradients() -> None:
    model = build()
    rows = tokens(2, 6)
    model(rows, labels=rows).loss.backward()
    with torch.no_grad():
        model.train()(rows, labels=rows, use_cache=False)
    with torch.inference_mode():
        model(rows, use_cache=False)
    assert counts(model) == [None] * 3
    model(rows, labels=rows, use_cache=False)
    assert all(count.any() for count in counts(model))


def test_counts_are_no_part_of_the_checkpoint_and_survive_casts() -> None:
    model = build().train()
    model(tokens(2, 6), labels=tokens(2, 6), use_cache=False)
    assert not [name for name in model.state_dict() if "load" in name]
    before = [router.load_counts.clone() for router in routers(model)]
    model.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(before, counts(model), strict=True))


GRADIENTS = ["output", "input", "gates", "gate_up", "down"]


def experts(dtype: torch.dtype) -> DeepseekV3Experts:
    config = tiny_config()
    module = randomize(DeepseekV3Experts(config)).to(dtype)
    module.config = config
    return module


def run_experts(implementation: str, hidden, indices, weights, module=None):
    """What `GRADIENTS` lists."""
    module = experts(hidden.dtype) if module is None else module
    module.config._experts_implementation = implementation
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = module(hidden, indices, weights)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    (output * probe).sum().backward()
    return [output.detach(), hidden.grad, weights.grad, *gradients(module).values()]


CHOICES = {
    "random": lambda: torch.rand(30, 8).topk(3)[1],
    "one token": lambda: torch.tensor([[5, 0, 3]]),
    "all tokens on one expert": lambda: torch.full((30, 1), 6),
    "first and last expert alone": lambda: torch.tensor([[0, 7]]).expand(30, 2).contiguous(),
    "every expert for every token": lambda: torch.arange(8).expand(5, 8).contiguous(),
    "same expert for the neighbours": lambda: torch.arange(8).repeat_interleave(2)[:, None],
}


@pytest.mark.parametrize("implementation", ["deepseek_v3", "eager"])
@pytest.mark.parametrize("name", CHOICES)
def test_experts_equal_the_definition_in_double_precision(name: str, implementation: str) -> None:
    indices = CHOICES[name]()
    hidden, weights = torch.randn(len(indices), 64), torch.rand(indices.shape)
    found = run_experts(implementation, hidden, indices, weights)
    module, hidden = experts(torch.float64), hidden.double().requires_grad_()
    weights = weights.double().requires_grad_()
    output = torch.zeros_like(hidden)
    for token, chosen in enumerate(indices.tolist()):
        for k, expert in enumerate(chosen):
            gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
            expert_output = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            output = output.index_add(0, torch.tensor([token]), (weights[token, k] * expert_output)[None])
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * probe).sum().backward()
    expected = [output, hidden.grad, weights.grad, *gradients(module).values()]
    for name, ours, theirs in zip(GRADIENTS, found, expected, strict=True):
        assert ours.dtype == torch.float32 and relative_error(ours, theirs) < 2e-6, name


@pytest.mark.parametrize("name", CHOICES)
def test_unused_experts_get_a_gradient_of_exactly_zero(name: str) -> None:
    indices = CHOICES[name]()
    hidden = torch.randn(len(indices), 64)
    unused = [expert for expert in range(8) if expert not in indices]
    for gradient in run_experts("deepseek_v3", hidden, indices, torch.rand(indices.shape))[3:]:
        assert gradient.isfinite().all() and not gradient[unused].any()
        assert gradient.flatten(1).any(1).sum() == 8 - len(unused)


def test_no_token_is_dropped() -> None:
    """Experts that return their input: every token has to come back as the sum of its weights times itself."""
    module = experts(torch.float32)
    eye = torch.eye(32, 64)
    gate = torch.zeros(32, 64)
    gate[:, -1] = 100.0  # silu(100) = 100 in fp32, for tokens whose last entry is 1
    with torch.no_grad():
        module.gate_up_proj.copy_(torch.cat((gate, eye / 100)))
        module.down_proj.copy_(eye.T)
    hidden = torch.cat((torch.randn(200, 32), torch.zeros(200, 31), torch.ones(200, 1)), dim=1)
    weights = torch.rand(200, 3)
    output = module(hidden, torch.tensor([[2, 3, 5]]).expand(200, 3), weights)
    torch.testing.assert_close(output[:, :32], hidden[:, :32] * weights.sum(1, keepdim=True))


def test_other_experts_are_left_to_transformers() -> None:
    """The implementation serves every MoE model; what is no SwiGLU is computed as `grouped_mm` does."""
    module, indices, hidden, weights = (
        experts(torch.float32),
        torch.rand(9, 8).topk(3)[1],
        torch.randn(9, 64),
        torch.rand(9, 3),
    )
    module.act_fn = torch.nn.GELU()
    found, expected = (run_experts(name, hidden, indices, weights, module)[0] for name in ("deepseek_v3", "eager"))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def nan_in_fresh_memory():
    """Memory that is read before it is written holds NaN, and not by luck zeros."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("align", [1, 64])
def test_a_choice_beyond_the_experts_is_left_to_another_rank(align: int, nan_in_fresh_memory, monkeypatch) -> None:
    """Expert parallelism marks such a choice with the number of local experts; its rows are never computed."""
    monkeypatch.setattr(torch_impl, "_alignment", lambda *_: align)
    indices, hidden, weights = torch.rand(30, 9).topk(3)[1], torch.randn(30, 64), torch.rand(30, 3)
    assert (indices == 8).any()
    results = []
    for implementation in ("deepseek_v3", "eager"):
        module = experts(torch.float32)
        module._is_expert_parallel = True
        results.append(run_experts(implementation, hidden, indices, weights, module))
    assert not results[0][2][indices == 8].any()
    for name, ours, theirs in zip(GRADIENTS, *results, strict=True):
        assert relative_error(ours, theirs) < 2e-6, name


@pytest.mark.parametrize("name", ["random", "all tokens on one expert", "first and last expert alone"])
def test_rows_aligned_for_onednn_equal_unaligned_ones(name: str, monkeypatch) -> None:
    indices = CHOICES[name]()
    hidden, weights = torch.randn(len(indices), 64), torch.rand(indices.shape)
    expected = run_experts("deepseek_v3", hidden, indices, weights)
    used = []
    monkeypatch.setattr(torch_impl, "_alignment", lambda *_: used.append(1) or 64)
    found = run_experts("deepseek_v3", hidden, indices, weights)
    assert used
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 2e-6


def test_bf16_on_cpu_takes_the_aligned_path_and_is_as_exact_as_eager() -> None:
    indices = torch.rand(200, 8).topk(3)[1]
    hidden, weights = torch.randn(200, 64), torch.rand(200, 3)
    assert torch_impl._alignment(hidden.bfloat16(), 600, 8) == 64
    assert torch_impl._alignment(hidden.bfloat16(), 100, 8) == torch_impl._alignment(hidden, 600, 8) == 1
    module = experts(torch.bfloat16)
    hidden = hidden.bfloat16()
    exact = run_experts("eager", hidden.double(), indices, weights.double(), experts(torch.bfloat16).double())
    ours = run_experts("deepseek_v3", hidden, indices, weights, module)
    eager = run_experts("eager", hidden, indices, weights, module)
    for found, stock, expected in zip(ours, eager, exact, strict=True):
        assert (found.double() - expected).norm() < 1.1 * (stock.double() - expected).norm() + 1e-6
        assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_experts_backward_is_deterministic() -> None:
    indices = torch.rand(64, 8).topk(3)[1]
    hidden, weights = torch.randn(64, 64), torch.rand(64, 3)
    first, second = (run_experts("deepseek_v3", hidden, indices, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_moe_layer_adds_the_shared_experts() -> None:
    config = tiny_config()
    layer = randomize(DeepseekV3MoE(config))
    layer.experts.config = config
    config._experts_implementation = "eager"
    hidden = torch.randn(2, 5, 64)
    output, logits, indices = layer(hidden)
    _, weights, _ = layer.gate(hidden)
    routed = layer.experts(hidden.view(-1, 64), indices, weights).view(2, 5, 64)
    torch.testing.assert_close(output - routed, layer.shared_experts(hidden), rtol=1e-5, atol=1e-5)
    assert logits.shape == (10, 8) and indices.shape == (10, 3)
