from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_v3.kernels.configs import forced_config
from deepseek_v3.kernels.router import reference, route
from tests.kernels.checks import assert_close, assert_compiles, compare

SHAPES = [  # tokens, experts, top_k, groups, top_groups
    (1, 256, 8, 8, 4),  # one token at V3's numbers
    (37, 64, 6, 1, 1),  # Moonlight's numbers; the last block of tokens is not full
    (9, 160, 6, 8, 3),  # V2's: groups of 20, masked columns inside
    (5, 72, 32, 9, 7),  # many choices, masked groups
    (4, 12, 12, 6, 6),  # everything is chosen, no group drops out
    (3, 3, 2, 1, 1),  # few experts, masked columns
    (2, 1000, 8, 4, 1),  # many experts, one group
]


@pytest.fixture
def blocks_of_16_tokens() -> Iterator[None]:
    """Instead of the table's one token per program, so that there are blocks that are not full."""
    entry = {"TOKENS": 16, "num_warps": 8}
    with forced_config("route_forward", entry), forced_config("route_backward", entry):
        yield


def gap(x):
    """The smallest difference between two values of a row."""
    return x.sort(dim=-1)[0].diff(dim=-1).amin(dim=-1) if x.shape[-1] > 1 else torch.ones(x.shape[:-1])


def inputs(tokens, experts, groups, device="cpu"):
    """Logits and bias for which fp32 and fp64 choose the same: no two scores or group scores within 2e-6."""
    bias = torch.randn(experts) / 10
    logits = torch.empty(0, experts)
    while len(logits) < tokens:
        more = torch.randn(2 * tokens, experts)
        biased = more.double().sigmoid() + bias
        group_scores = biased.unflatten(1, (groups, -1)).topk(2)[0].sum(-1)
        logits = torch.cat((logits, more[(gap(biased) > 2e-6) & (gap(group_scores) > 2e-6)]))
    return logits[:tokens].to(device), bias.to(device)


def by_expert(weights, indices, counts):
    """The K choices of a token, whose order is free, in the order of their experts."""
    indices, order = indices.sort(dim=1)
    return weights.gather(1, order), indices, counts


def op(*args, **fixed):
    return by_expert(*route(*args, **fixed))


def exact(logits, bias, top_k, num_groups=1, top_groups=1, normalize=True, scale=1.0, token_mask=None):
    """One token after the other, with Python's sort."""
    scores = 1 / (1 + torch.exp(-logits))
    size, indices = logits.shape[1] // num_groups, []
    for row in (scores + bias).tolist():
        groups = [range(start, start + size) for start in range(0, len(row), size)]
        groups.sort(key=lambda group: -sum(sorted(row[expert] for expert in group)[-2:]))
        candidates = sorted((expert for group in groups[:top_groups] for expert in group), key=lambda e: -row[e])
        indices.append(sorted(candidates[:top_k]))
    indices = torch.tensor(indices, device=logits.device)
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / weights.sum(1, keepdim=True)
    real = indices if token_mask is None else indices[token_mask]
    return weights * scale, indices, torch.bincount(real.flatten(), minlength=logits.shape[1])


@pytest.mark.usefixtures("blocks_of_16_tokens")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "groups", "top_groups"), SHAPES)
def test_against_fp64(tokens, experts, top_k, groups, top_groups, normalize, device, triton_kernels) -> None:
    mask = torch.rand(tokens, device=device) < 0.7 if normalize else None
    fixed = {"top_k": top_k, "num_groups": groups, "top_groups": top_groups, "normalize": normalize, "scale": 2.5}
    compare(op, exact, *inputs(tokens, experts, groups, device), token_mask=mask, **fixed)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "groups", "top_groups"), SHAPES)
def test_reference_against_fp64(tokens, experts, top_k, groups, top_groups) -> None:
    fixed = {"top_k": top_k, "num_groups": groups, "top_groups": top_groups, "token_mask": torch.rand(tokens) < 0.7}
    compare(lambda *a, **b: by_expert(*reference.route(*a, **b)), exact, *inputs(tokens, experts, groups), **fixed)


def test_reference_gradcheck() -> None:
    logits, bias = inputs(3, 8, 2)
    logits = logits.double().requires_grad_()
    torch.autograd.gradcheck(lambda x: reference.route(x, bias, 3, 2, 1, True, 2.5)[0], logits)


def test_one_token_per_program(device, triton_kernels) -> None:
    compare(op, exact, *inputs(3, 256, 8, device), top_k=8, num_groups=8, top_groups=4)


def test_best_first(device, triton_kernels) -> None:
    logits, bias = inputs(7, 64, 4, device)
    _, indices, _ = route(logits, bias, 6, 4, 2)
    assert (logits.sigmoid() + bias).gather(1, indices).diff(dim=1).lt(0).all()


def test_ties_go_to_the_lowest_expert(device, triton_kernels) -> None:
    logits = torch.zeros(2, 12, device=device)
    logits[1, 5] = logits[1, 11] = 1
    _, indices, _ = route(logits, torch.zeros(12, device=device), 4, 4, 2)
    assert indices.tolist() == [[0, 1, 2, 3], [5, 11, 3, 4]]


def test_two_equal_scores_count_twice_in_their_group(device, triton_kernels) -> None:
    logits = torch.tensor([[3.0, 0.0, 2.0, 2.0]], device=device)  # 0.95 + 0.5 against twice 0.88
    assert route(logits, torch.zeros(4, device=device), 2, 2, 1)[1].tolist() == [[2, 3]]


def test_a_strong_bias_chooses_but_does_not_weigh(device, triton_kernels) -> None:
    logits = torch.zeros(1, 6, device=device)
    bias = torch.tensor([0.0, -torch.inf, 100.0, -100.0, torch.inf, -torch.inf], device=device)
    weights, indices, counts = route(logits, bias, 5, 3, 3, normalize=False)
    assert indices.tolist() == [[4, 2, 0, 3, 1]] and weights.eq(0.5).all()
    assert counts.tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value, device, triton_kernels) -> None:
    logits, bias = inputs(4, 20, 4, device)
    logits[0] = value
    logits[1, ::3] = value
    logits[2, 7] = value
    weights, indices, counts = route(logits, bias, 6, 4, 2)
    assert 0 <= indices.min() and indices.max() < 20 and counts.sum() == 24
    assert all(len(set(row)) == 6 for row in indices.tolist())
    assert torch.equal(indices[2:].sort()[0], reference.route(logits, bias, 6, 4, 2)[1][2:].sort()[0])
    assert weights[3].isfinite().all() and weights[:3].isnan().any(1).all() == torch.tensor(value).isnan()


def test_scores_so_small_that_they_vanish(device, triton_kernels) -> None:
    """`sum(s) + 1e-20` is not zero: no NaN in the weights nor the gradient."""
    logits = torch.full((2, 8), -200.0, device=device, requires_grad=True)
    weights, _, _ = route(logits, torch.zeros(8, device=device), 2)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert weights.eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t().contiguous().t()], ids=["rows", "columns"])
def test_a_slice_of_wider_rows(layout, device, triton_kernels) -> None:
    logits, bias = inputs(3, 24, 4, device)
    wide = torch.cat((logits, torch.full_like(logits, 9.0)), dim=1)
    fixed = {"top_k": 3, "num_groups": 4, "top_groups": 2}
    compare(lambda x, b: op(layout(x)[:, :24], b, **fixed), lambda x, b: exact(x[:, :24], b, **fixed), wide, bias)


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 8 GiB of address space only
    near, bias = inputs(3, 16, 1, device)
    far = torch.empty(2**31 + 16, device=device).as_strided((3, 16), (2**30, 1))
    far.copy_(near)

    def both_ways(logits):
        weights, indices, counts = route(logits, bias, 4)
        grad = torch.ops.deepseek_v3.route_backward(near[:, :4], logits, indices, True, 1.0)
        return weights, indices, counts, grad

    assert all(map(torch.equal, both_ways(far), both_ways(near)))


def test_no_tokens(device, triton_kernels) -> None:
    logits = torch.randn(0, 8, device=device, requires_grad=True)
    weights, indices, counts = route(logits, torch.zeros(8, device=device), 2)
    weights.sum().backward()
    assert weights.shape == indices.shape == (0, 2) and counts.eq(0).all() and logits.grad.shape == (0, 8)


def test_no_gradient_but_to_the_logits(device, triton_kernels) -> None:
    logits, bias = inputs(3, 8, 1, device)
    weights, indices, counts = route(logits.requires_grad_(), bias.requires_grad_(), 2)
    weights.square().sum().backward()
    assert bias.grad is None and not indices.requires_grad and not counts.requires_grad
    assert logits.grad.ne(0).sum() == 3 * 2


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    logits, bias = inputs(3, 16, 4, device)
    mask = torch.tensor([True, False, True], device=device)
    assert_compiles(op, logits, bias, top_k=3, num_groups=4, top_groups=2, token_mask=mask)
    arguments = (logits.requires_grad_(), bias, 3, 4, 2, True, 2.5, mask)
    torch.library.opcheck(torch.ops.deepseek_v3.route.default, arguments)


@st.composite
def routings(draw):
    """Logits, bias and the arguments of `route`."""
    groups = draw(st.integers(1, 6))
    experts = groups * draw(st.integers(2, 24))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(32, top_groups * (experts // groups))))
    tokens = draw(st.integers(1, 20))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    mask = torch.rand(tokens) < 0.5 if draw(st.booleans()) else None
    fixed = {"top_k": top_k, "num_groups": groups, "top_groups": top_groups, "normalize": draw(st.booleans())}
    return *inputs(tokens, experts, groups), fixed, mask


@pytest.mark.usefixtures("blocks_of_16_tokens")
@given(routing=routings(), shift=st.sampled_from([-3.0, 0.25, 1.0]))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_properties(routing, shift, device, triton_kernels) -> None:
    logits, bias, fixed, mask = routing
    logits, bias, mask = logits.to(device), bias.to(device), None if mask is None else mask.to(device)
    weights, indices, counts = route(logits, bias, **fixed, token_mask=mask)
    expected = by_expert(*reference.route(logits, bias, **fixed, token_mask=mask))
    for found, value in zip(by_expert(weights, indices, counts), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=0)

    rows = indices.tolist()
    size = logits.shape[1] // fixed["num_groups"]
    assert all(len(set(row)) == fixed["top_k"] for row in rows)  # distinct
    assert all(len({expert // size for expert in row}) <= fixed["top_groups"] for row in rows)
    real = len(logits) if mask is None else int(mask.sum())
    assert counts.sum() == fixed["top_k"] * real
    if fixed["normalize"]:
        assert_close(weights.sum(1), torch.ones(len(logits)), "sum of the weights")

    shifted = route(logits, bias + shift, **fixed)  # adding to all biases changes nothing
    assert torch.equal(shifted[1], indices) and torch.equal(shifted[0], weights)
    scaled = route(logits, bias, **fixed, scale=4.0)
    assert torch.equal(scaled[1], indices) and torch.equal(scaled[0], 4 * weights)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", {"logits": torch.zeros(8)}),
        ("logits", {"logits": torch.zeros(3, 8, dtype=torch.bfloat16)}),
        ("bias", {"bias": torch.zeros(7)}),
        ("bias", {"bias": torch.zeros(8, dtype=torch.bfloat16)}),
        ("num_groups", {"num_groups": 3}),
        ("num_groups", {"num_groups": 0}),
        ("num_groups", {"num_groups": 8, "top_groups": 8}),  # one expert per group has no second best
        ("top_groups", {"top_groups": 5}),
        ("top_groups", {"top_groups": 0}),
        ("top_k", {"top_k": 5}),
        ("top_k", {"top_k": 0}),
        ("token_mask", {"token_mask": torch.ones(4, dtype=torch.bool)}),
        ("token_mask", {"token_mask": torch.ones(3)}),
    ],
)
def test_arguments_that_do_not_fit(name, change) -> None:
    arguments = {"logits": torch.zeros(3, 8), "bias": torch.zeros(8), "top_k": 3, "num_groups": 4, "top_groups": 2}
    with pytest.raises(ValueError, match=f"^{name}: found .*allowed"):
        route(**(arguments | change))
