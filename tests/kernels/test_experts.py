from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_v3.kernels.configs import forced_config
from deepseek_v3.kernels.dispatch import kernels
from deepseek_v3.kernels.experts import grouped_swiglu_experts, permutation, reference, torch_impl
from tests.kernels.checks import DTYPES, TOLERANCE, assert_close, assert_compiles, compare, run

SMALL_BLOCKS = {
    "experts_tiles": {"BLOCK_M": 16},
    "experts_gate_up": {"BLOCK_N": 64, "BLOCK_K": 64},
    "experts_product": {"BLOCK_N": 64, "BLOCK_K": 64},
    "experts_grad_activation": {"BLOCK_N": 64, "BLOCK_K": 64},
    "experts_grad_parameter": {"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_K": 16},
    "experts_combine": {"ROWS": 16, "BLOCK": 64},
}
SHAPES = {  # tokens, experts, chosen, hidden, intermediate
    "one token, fewer choices than experts": (1, 9, 6, 64, 32),
    "one chosen": (9, 2, 1, 32, 32),
    "odd sizes, no row aligned to 16 bytes": (21, 3, 2, 97, 33),
    "whole blocks: no masks": (32, 2, 2, 128, 64),
}


def exact_experts(hidden, indices, weights, gate_up, down):
    """Every expert on every token, then the mixture."""
    gate, up = torch.einsum("nh,eoh->neo", hidden, gate_up).chunk(2, -1)
    outputs = torch.einsum("nei,ehi->neh", F.silu(gate) * up, down)
    mixture = torch.einsum("nk,nke->ne", weights, F.one_hot(indices, len(gate_up) + 1)[..., :-1].to(weights))
    return torch.einsum("ne,neh->nh", mixture, outputs)


def choices(tokens: int, experts: int, chosen: int, elsewhere: bool = False) -> torch.Tensor:
    """Distinct experts for each token; with `elsewhere`, some are E."""
    indices = torch.rand(tokens, experts).topk(chosen, sorted=False)[1]
    return indices.masked_fill(torch.rand(tokens, chosen) < 0.4, experts) if elsewhere else indices


def inputs(indices, experts, hidden, intermediate, dtype, device):
    tokens = indices.shape[0]
    values = (
        torch.randn(tokens, hidden).to(dtype),
        indices,
        torch.rand(indices.shape) + 0.1,
        (1.5 * torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, intermediate) / intermediate**0.5).to(dtype),
    )
    return tuple(x.to(device) for x in values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, device, triton_kernels) -> None:
    tokens, experts, chosen, hidden, intermediate = SHAPES[shape]
    indices = choices(tokens, experts, chosen)
    arguments = inputs(indices, experts, hidden, intermediate, dtype, device)
    compare(grouped_swiglu_experts, exact_experts, *arguments, tolerance=TOLERANCE[dtype])  # for the fp32 weights too


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: choices(27, 3, 2, elsewhere=True), id="tail blocks, choices of other ranks"),
        pytest.param(lambda: choices(27, 2, 2), id="an expert without rows"),  # the last of three
        pytest.param(lambda: torch.full((27, 1), 1), id="all rows on one expert"),
        pytest.param(lambda: torch.full((5, 2), 3), id="no choice of ours"),
    ],
)
def test_several_tiles_in_every_direction(draw, device, triton_kernels) -> None:
    arguments = inputs(draw(), 3, 97, 70, torch.float32, device)
    with ExitStack() as stack:
        for kernel, entry in SMALL_BLOCKS.items():
            stack.enter_context(forced_config(kernel, entry))
        compare(grouped_swiglu_experts, exact_experts, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_fp64(dtype) -> None:
    arguments = inputs(choices(19, 3, 2, elsewhere=True), 3, 64, 32, dtype, "cpu")
    compare(reference.grouped_swiglu_experts, exact_experts, *arguments, tolerance=TOLERANCE[dtype])


def test_gradcheck_of_the_reference() -> None:
    hidden, indices, weights, gate_up, down = inputs(choices(4, 3, 2, True), 3, 5, 3, torch.float64, "cpu")
    leaves = [x.double().requires_grad_() for x in (hidden, weights, gate_up, down)]
    assert torch.autograd.gradcheck(
        lambda x, w, g, d: reference.grouped_swiglu_experts(x, indices, w, g, d), leaves, atol=1e-6
    )


def test_no_tokens(device, triton_kernels) -> None:
    arguments = inputs(torch.empty(0, 2, dtype=torch.int64), 3, 64, 32, torch.float32, device)
    outputs, grads = run(grouped_swiglu_experts, *arguments)
    assert outputs[0].shape == (0, 64) and grads[3].eq(0).all() and grads[4].eq(0).all()


def test_exact_zeros_where_nothing_is_computed(device, triton_kernels) -> None:
    indices = torch.tensor([[0, 1], [3, 3], [1, 3]])  # token 1 has no choice of ours, expert 2 no row
    outputs, grads = run(grouped_swiglu_experts, *inputs(indices, 3, 64, 32, torch.bfloat16, device))
    assert outputs[0][1].eq(0).all() and grads[0][1].eq(0).all() and grads[2][indices == 3].eq(0).all()
    assert grads[3][2].eq(0).all() and grads[4][2].eq(0).all()


def test_frozen_parameters(device, triton_kernels) -> None:
    hidden, indices, weights, gate_up, down = inputs(choices(9, 3, 2), 3, 64, 32, torch.float32, device)
    expected = run(grouped_swiglu_experts, hidden, indices, weights, gate_up, down)[1]
    found = run(lambda x, w: grouped_swiglu_experts(x, indices, w, gate_up, down), hidden, weights)[1]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[2])


def test_strided_inputs_and_an_expanded_gradient(device, triton_kernels) -> None:
    hidden, indices, weights, gate_up, down = inputs(choices(9, 3, 2), 3, 64, 32, torch.float32, device)
    strided = (hidden.t().contiguous().t(), indices.t().contiguous().t(), weights.t().contiguous().t())

    def summed(*arguments):
        return grouped_swiglu_experts(*arguments).sum()

    compare(summed, lambda *arguments: exact_experts(*arguments).sum(), *strided, gate_up.mT.contiguous().mT, down)


def examples(count: int) -> settings:
    """`device` is the same for all examples of a test, so its scope does not matter."""
    return settings(max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(30)
@given(st.integers(0, 700), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**32))
def test_permutation(device, tokens, chosen, experts, seed) -> None:
    indices = torch.randint(experts + 1, (tokens, chosen), generator=torch.Generator().manual_seed(seed))
    flat = indices.flatten()
    for mode in ("reference", "triton"):
        with kernels(mode):
            order, slots, offsets = (x.cpu() for x in permutation(indices.to(device), experts))
        assert order.dtype == slots.dtype == offsets.dtype == torch.int32
        assert torch.equal(order.sort()[0], torch.arange(flat.numel(), dtype=torch.int32))  # every choice once
        assert torch.equal(slots.flatten()[order.long()], torch.arange(flat.numel(), dtype=torch.int32))  # and back
        assert torch.equal(order.long(), flat.argsort(stable=True))
        counts = flat.bincount(minlength=experts + 1)[:experts]
        assert torch.equal(offsets, F.pad(counts.cumsum(0), (1, 0)).int())


@examples(20)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32))
def test_combining_equal_rows_returns_the_row(device, tokens, chosen, seed) -> None:
    from deepseek_v3.kernels.experts.triton_impl import combine

    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(40, generator=generator).to(device)
    indices = torch.rand(tokens, 9, generator=generator).topk(chosen)[1].to(device)
    with kernels("triton"):
        _, slots, offsets = permutation(indices, 9)
    weights = torch.rand(tokens, chosen, generator=generator).softmax(-1).to(device)
    with forced_config("experts_combine", SMALL_BLOCKS["experts_combine"]):
        found = combine(row.expand(tokens * chosen, -1).contiguous(), slots, offsets, weights)
    torch.testing.assert_close(found, row.expand(tokens, -1))


@examples(40)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.sampled_from([16, 64]))
def test_tiles_cover_every_slot_once(device, counts, block_m) -> None:
    from deepseek_v3.kernels.experts.triton_impl import expert_tiles

    offsets = F.pad(torch.tensor(counts).cumsum(0), (1, 0)).int()
    table = expert_tiles(offsets.to(device), sum(counts), block_m).table
    found = [(e, slot) for e, first, end in table.t().tolist() for slot in range(first, min(first + block_m, end))]
    assert found == [(e, slot) for e in range(len(counts)) for slot in range(offsets[e], offsets[e + 1])]


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    from deepseek_v3.kernels.experts.triton_impl import Tiles, gate_up_rows, grouped_product

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    rows, far = 3, 2**20  # expert and slot far; 2^20 experts of 64 x 32, 2^26 slots of 32
    hidden = torch.randn(rows, 32, device=device).bfloat16()
    order = torch.arange(rows, dtype=torch.int32, device=device)
    parameters = torch.empty(far + 1, 64, 32, dtype=torch.bfloat16, device=device)
    parameters[far] = torch.randn(64, 32)
    tiles = Tiles(torch.tensor([[far], [0], [rows]], dtype=torch.int32, device=device), 16)
    found = gate_up_rows(hidden, parameters, order, tiles, top_k=1)
    gate, up = (hidden.double() @ parameters[far].double().t()).chunk(2, -1)
    assert_close(found, F.silu(gate) * up, "far expert")

    slots = torch.empty(2**26 + rows, 32, dtype=torch.bfloat16, device=device)
    slots[-rows:] = hidden
    tiles = Tiles(torch.tensor([[far], [2**26], [2**26 + rows]], dtype=torch.int32, device=device), 16)
    found = grouped_product(slots, parameters, tiles)[-rows:]
    assert_close(found, hidden.double() @ parameters[far].double().t(), "far rows")


def test_addresses_past_32_bits_in_backward(device, triton_kernels, monkeypatch) -> None:
    from deepseek_v3.kernels.experts.triton_backward import _grad_activation
    from deepseek_v3.kernels.experts.triton_impl import Tiles

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, far, width = 3, 2**25, 32  # slots from 2^25 on, each with 64 values of gate and up
    grad, gate_up = torch.randn(rows, width, device=device), torch.randn(rows, 2 * width, device=device)
    weights, down = torch.rand(rows, 1, device=device), torch.randn(1, width, width, device=device)
    order = torch.empty(far + rows, dtype=torch.int32, device=device)
    order[-rows:] = torch.arange(rows)
    slots = torch.empty(far + rows, 2 * width, device=device)
    slots[-rows:] = gate_up
    tiles = Tiles(torch.tensor([[0], [far], [far + rows]], dtype=torch.int32, device=device), 16)
    activation, grad_weights = _grad_activation(grad, weights, down, slots, order, tiles)
    gate_up = gate_up.double().requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    exact = F.silu(gate) * up
    exact_grad = grad.double() @ down[0].double()
    exact.backward(weights.double() * exact_grad)
    assert_close(activation[-rows:], weights.double() * exact, "activation")
    assert_close(grad_weights, (exact_grad * exact).sum(1, keepdim=True), "gradient of the weights")
    assert_close(slots[-rows:], gate_up.grad, "gradient of gate and up")


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    hidden, indices, weights, gate_up, down = inputs(choices(3, 2, 1), 2, 32, 32, torch.float32, device)
    assert_compiles(grouped_swiglu_experts, hidden, indices, weights, gate_up, down)
    leaves = [x.requires_grad_() for x in (hidden, weights, gate_up, down)]
    torch.library.opcheck(
        torch.ops.deepseek_v3.grouped_swiglu_experts.default, (*leaves, *permutation(indices, 2), False)
    )
    torch.library.opcheck(torch.ops.deepseek_v3.expert_permutation.default, (indices, 2))


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden", lambda x: x[None]),
        ("indices", lambda x: x.int()),
        ("weights", lambda x: x[:, :1]),
        ("gate_up", lambda x: x[:, :-1]),
        ("gate_up", lambda x: x.half()),
        ("down", lambda x: x.mT),
    ],
)
def test_wrong_arguments_are_named(argument, change) -> None:
    names = ("hidden", "indices", "weights", "gate_up", "down")
    values = dict(zip(names, inputs(choices(6, 3, 2), 3, 40, 32, torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=f"^{argument} .*allowed"):
        grouped_swiglu_experts(**{**values, argument: change(values[argument])})


TORCH_SHAPES = {  # tokens, experts, chosen, hidden, intermediate
    "several tokens, fewer choices than experts": (2, 9, 3, 64, 32),
    "rows padded on a CPU in bf16": (70, 4, 2, 64, 32),
    "no token": (0, 4, 2, 64, 32),
    "rows that grouped_mm does not take": (5, 3, 2, 97, 33),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("shape", TORCH_SHAPES)
def test_torch_products_against_fp64(shape, elsewhere, dtype) -> None:
    tokens, experts, chosen, hidden, intermediate = TORCH_SHAPES[shape]
    values = inputs(choices(tokens, experts, chosen, elsewhere), experts, hidden, intermediate, dtype, "cpu")
    # 1.2: the reference, which serves the last shape, rounds the gate, its activation and the product
    compare(grouped_swiglu_experts, exact_experts, *values, tolerance=1.2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_on_a_cpu_against_fp64(dtype) -> None:
    indices = torch.tensor([[3, 4, 0]])  # 4: an expert of another rank
    hidden, indices, *rest = inputs(indices, 4, 64, 32, dtype, "cpu")
    exact = exact_experts(hidden.double(), indices, *(x.double() for x in rest))
    with torch.no_grad():
        assert torch_impl.is_one_token(hidden)
        assert_close(grouped_swiglu_experts(hidden, indices, *rest), exact, "output")
    assert not torch_impl.is_one_token(hidden)  # autograd records: the other path is differentiable


def test_torch_products_compile_and_keep_nothing_then(monkeypatch) -> None:
    values = inputs(choices(6, 4, 2), 4, 32, 32, torch.float32, "cpu")
    assert_compiles(grouped_swiglu_experts, *values)
    hidden, indices, weights, gate_up, down = values
    arguments = (hidden.requires_grad_(), weights, gate_up, down, *permutation(indices, 4))
    for keep, elements in ((False, 0), (True, 12 * 64)):
        output, projected = torch.ops.deepseek_v3.grouped_swiglu_experts(*arguments, keep)
        assert projected.numel() == elements
        (grad,) = torch.autograd.grad(output.square().sum(), hidden)
        exact = hidden.detach().double().requires_grad_()
        output = exact_experts(exact, indices, *(x.double() for x in (weights, gate_up, down)))
        assert_close(grad, torch.autograd.grad(output.square().sum(), exact)[0], f"gradient, {keep=}")
