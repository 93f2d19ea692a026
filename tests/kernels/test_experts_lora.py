"""The experts with adapters against every expert on every token in fp64, the adapters merged into the weights."""

import pytest
import torch
from torch import nn

from deepseek_v3.kernels.experts import lora
from deepseek_v3.kernels.experts.lora import grouped_lora_experts
from deepseek_v3.kernels.int4 import dequantize_int4, int4_grouped_linear, quantize_int4
from deepseek_v3.kernels.int8 import dequantize_int8, int8_grouped_linear, int8_linear, quantize_int8
from tests.kernels.checks import DTYPES, TOLERANCE, assert_close, compare, run
from tests.kernels.test_experts import choices, exact_experts, inputs

SHAPES = {  # the choices, experts, hidden, intermediate, rank
    "several tokens": (lambda: choices(21, 4, 2), 4, 64, 32, 8),
    "odd sizes, rank 3": (lambda: choices(9, 3, 2), 3, 97, 33, 3),
    "choices of other ranks": (lambda: choices(27, 3, 2, elsewhere=True), 3, 64, 32, 16),
    "an expert without rows, rank 3": (lambda: choices(27, 2, 2), 3, 64, 32, 3),
    "all rows on one expert": (lambda: torch.full((27, 1), 1), 3, 64, 32, 8),
    "no choice of ours": (lambda: torch.full((5, 2), 3), 3, 64, 32, 8),
    "no token": (lambda: choices(0, 3, 2), 3, 64, 32, 8),
    "one token": (lambda: choices(1, 9, 6), 9, 64, 32, 8),
    "padded rows on a CPU in bf16": (lambda: choices(70, 4, 2), 4, 64, 32, 8),
}
NAMES = ("hidden", "weights", "gate_up A", "gate_up B", "down A", "down B")


class Quantized:
    """A base weight in another form, that counts how often it is dequantized and whether the tensors live on."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape, self.device, self._half, self.calls = weight.shape, weight.device, weight / 2, 0

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        self.calls += 1
        return 2 * self._half.to(dtype)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return 2 * self._half[expert]


class WithProduct(Quantized):
    """One that rows are multiplied with as it is; reading it in any other way is counted, or fails for one expert."""

    products = 0

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        assert offsets.dtype == torch.int32 and not torch.is_grad_enabled()
        self.products += 1
        y = x.new_zeros(len(x), self.shape[1])
        for expert, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            y[first:end] = x[first:end] @ (2 * self._half[expert]).T
        return y

    def __getitem__(self, expert: int) -> torch.Tensor:
        raise AssertionError("one expert was dequantized")


class Packed:
    """A base weight in INT4 or INT8, as exported models have it."""

    def __init__(self, weight: torch.Tensor, bits: int) -> None:
        self.shape, self.device, self.bits = weight.shape, weight.device, bits
        self.parts = quantize_int4(weight, 32) if bits == 4 else quantize_int8(weight)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (dequantize_int4 if self.bits == 4 else dequantize_int8)(*self.parts, dtype)

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return (int4_grouped_linear if self.bits == 4 else int8_grouped_linear)(x, *self.parts, offsets)


class QuantizedParameter(nn.Parameter):
    """The same as a parameter, as modules hold it: packed bytes with the shape of what they stand for."""

    def __new__(cls, weight: torch.Tensor):
        self = super().__new__(cls, torch.zeros(weight.numel() // 2, dtype=torch.uint8), requires_grad=False)
        self.weight = weight.clone()
        return self

    @property
    def shape(self):
        return self.weight.shape

    def dequantize(self, dtype):
        return self.weight.to(dtype, copy=True)

    def __getitem__(self, expert):
        return self.weight[expert]


def adapted(gate_up, down, rank):
    """A and B of both weights, of a size that shows."""
    factors = []
    for weight in (gate_up, down):
        experts, out, width = weight.shape
        factors.append(torch.randn(experts, rank, width) / width**0.5)
        factors.append(torch.randn(experts, out, rank) / rank**0.5)
    return [x.to(gate_up) for x in factors]


def case(shape, dtype, device="cpu"):
    draw, experts, hidden, intermediate, rank = SHAPES[shape]
    x, indices, weights, gate_up, down = inputs(draw(), experts, hidden, intermediate, dtype, device)
    return indices, gate_up, down, (x, weights, *adapted(gate_up, down, rank))


def ops(indices, gate_up, down, dropout=0.0):
    """The op and its definition as functions of what has a gradient."""

    def op(x, weights, a1, b1, a2, b2):
        return grouped_lora_experts(x, indices, weights, gate_up, down, (a1, b1), (a2, b2), dropout)

    def exact(x, weights, a1, b1, a2, b2):
        merged = (gate_up.to(x) + b1 @ a1, down.to(x) + b2 @ a2)
        return exact_experts(x, indices, weights, *merged)

    return op, exact


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def grouped(request, monkeypatch):
    """The path of GPUs runs on CPU tensors too."""
    if request.param:

        def takes(device, dtype, *widths):
            return dtype in DTYPES and all(width * dtype.itemsize % 16 == 0 for width in widths)

        monkeypatch.setattr(lora, "_takes_grouped_mm", takes)
        monkeypatch.setattr(lora, "_keeps_projections", lambda device: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, grouped) -> None:
    indices, gate_up, down, leaves = case(shape, dtype)
    # 2: as the experts, with the adapter's inner product and its sum with the base rounded too
    compare(*ops(indices, gate_up, down), *leaves, tolerance=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_gradcheck(elsewhere) -> None:
    torch.manual_seed(0)
    x, indices, weights, gate_up, down = inputs(choices(5, 3, 2, elsewhere), 3, 5, 3, torch.float64, "cpu")
    leaves = [t.double().requires_grad_() for t in (x, weights, *adapted(gate_up, down, 2))]
    assert torch.autograd.gradcheck(ops(indices, gate_up, down)[0], leaves)

    def with_fixed_masks(*arguments):
        torch.manual_seed(1)
        return ops(indices, gate_up, down, 0.4)[0](*arguments)

    assert torch.autograd.gradcheck(with_fixed_masks, leaves)


@pytest.mark.parametrize("adapters", ["none", "gate_up", "down"])
def test_adapters_on_some_weights(adapters, grouped) -> None:
    indices, gate_up, down, leaves = case("choices of other ranks", torch.float32)
    op, exact = ops(indices, gate_up, down)
    x, weights, *factors = leaves
    zeros = [t if adapters in name else torch.zeros_like(t) for name, t in zip(NAMES[2:], factors, strict=True)]
    pairs = [pair if pair[0].any() else None for pair in (tuple(zeros[:2]), tuple(zeros[2:]))]
    assert [pair is not None for pair in pairs] == [adapters == "gate_up", adapters == "down"]

    def some(x, weights):
        return grouped_lora_experts(x, indices, weights, gate_up, down, *pairs)

    compare(some, lambda x, w: exact(x, w, *(t.to(x) for t in zeros)), x, weights)


@pytest.mark.parametrize("shape", ["several tokens", "choices of other ranks"])
def test_dropout_against_explicit_masks(shape, monkeypatch, grouped) -> None:
    indices, gate_up, down, leaves = case(shape, torch.float32)
    masks, draw = [], lora._mask
    monkeypatch.setattr(lora, "_mask", lambda x, p: masks.append(draw(x, p)) or masks[-1])
    op, _ = ops(indices, gate_up, down, 0.3)
    found, grads = run(op, *leaves)
    token_mask, row_mask = (mask.double() / 0.7 for mask in masks)
    assert 0.4 < float(token_mask.eq(0).double().mean()) + 0.15 < 0.6
    order = indices.flatten().argsort(stable=True)
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(indices)

    def exact(x, weights, a1, b1, a2, b2):
        output = []
        for token in range(len(x)):
            total = torch.zeros_like(x[token])
            for k, expert in enumerate(indices[token].tolist()):
                if expert < len(gate_up):
                    low = b1[expert] @ a1[expert] @ (x[token] * token_mask[token])
                    gate, up = (gate_up[expert].to(x) @ x[token] + low).chunk(2)
                    active = nn.functional.silu(gate) * up
                    low = b2[expert] @ a2[expert] @ (active * row_mask[row_of[token, k]])
                    total = total + weights[token, k] * (down[expert].to(x) @ active + low)
            output.append(total)
        return torch.stack(output)

    expected, exact_grads = run(exact, *(t.double() for t in leaves))
    assert_close(found[0], expected[0], "output")
    for name, a, b in zip(NAMES, grads, exact_grads, strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("make", [Quantized, QuantizedParameter])
def test_a_quantized_base_weight(make, grouped) -> None:
    indices, gate_up, down, leaves = case("several tokens", torch.float32)
    expected = run(ops(indices, gate_up, down)[0], *leaves)
    quantized = make(gate_up), make(down)
    found = run(ops(indices, *quantized)[0], *leaves)
    for a, b in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        assert torch.equal(a, b)
    if make is Quantized:
        assert [weight.calls for weight in quantized] == [3 if grouped else 2, 2]  # one more to compute anew


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_base_weight_with_a_product(shape, dtype, grouped) -> None:
    indices, gate_up, down, leaves = case(shape, dtype)
    quantized = WithProduct(gate_up), WithProduct(down)
    exact = ops(indices, gate_up, down)[1]
    compare(ops(indices, *quantized)[0], exact, *leaves, tolerance=2 * TOLERANCE[dtype])
    # gate and up anew in backward, where they are not kept
    assert [weight.products for weight in quantized] == [2 if grouped and dtype in DTYPES else 1, 1]
    assert [weight.calls for weight in quantized] == [1, 1]  # for the gradients
    with torch.no_grad():
        found = ops(indices, *quantized)[0](*leaves)
        assert_close(found, exact(*(t.double() for t in leaves)), "without gradients", 2 * TOLERANCE[dtype])
        x, weights, *factors = leaves
        found = grouped_lora_experts(x, indices, weights, *quantized, None, None)
        wide = (x.double(), indices, weights.double(), gate_up.double(), down.double())
        expected = exact_experts(*wide)
        assert_close(found, expected, "without adapters", 2 * TOLERANCE[dtype])
    assert [weight.calls for weight in quantized] == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["several tokens", "choices of other ranks", "no choice of ours", "one token"])
def test_int4_base_weights(shape, dtype, device, triton_kernels) -> None:
    indices, gate_up, down, leaves = case(shape, dtype, device)
    packed = Packed(gate_up, 4), Packed(down, 4)
    op = ops(indices, *packed)[0]
    exact = ops(indices, *(weight.dequantize(torch.float64) for weight in packed))[1]
    compare(op, exact, *leaves, tolerance=2 * TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(op(*leaves), exact(*(t.double() for t in leaves)), "without gradients", 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", ["several tokens", "choices of other ranks", "no choice of ours", "one token"])
def test_int8_base_weights(shape, device, triton_kernels) -> None:
    """Token by token, with the layer's own product and in its dtype."""
    indices, gate_up, down, (x, weights, *_) = case(shape, torch.bfloat16, device)
    packed = Packed(gate_up, 8), Packed(down, 8)
    (codes1, scale1), (codes2, scale2) = (weight.parts for weight in packed)
    expected = torch.zeros(x.shape, dtype=torch.float64, device=device)
    for token in range(len(x)):
        for weight, expert in zip(weights[token].double(), indices[token].tolist(), strict=True):
            if expert < len(gate_up):
                gate, up = int8_linear(x[token], codes1[expert], scale1[expert]).chunk(2)
                expected[token] += weight * int8_linear(nn.functional.silu(gate) * up, codes2[expert], scale2[expert])
    with torch.no_grad():
        found = grouped_lora_experts(x, indices, weights, *packed, None, None)
    # A last bit of the activation (other roundings, weighted or not) can move a code by one of 127, in all terms.
    assert_close(found, expected, "output", 0.01)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_kept_for_backward(quantized, grouped) -> None:
    indices, gate_up, down, leaves = case("padded rows on a CPU in bf16", torch.float32)
    leaves = [t.requires_grad_() for t in leaves]
    base = (Quantized(gate_up), Quantized(down)) if quantized else (gate_up, down)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops(indices, *base)[0](*leaves)
    tokens, chosen = indices.shape
    sorting = 2 * tokens * chosen + len(gate_up) + 1
    projections = 0 if grouped else tokens * chosen * gate_up.shape[1]
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in leaves) + sorting + projections


def test_only_wanted_gradients(grouped) -> None:
    indices, gate_up, down, leaves = case("several tokens", torch.float32)
    expected = run(ops(indices, gate_up, down)[0], *leaves)[1]
    x, *rest = leaves  # as below a frozen embedding
    output = ops(indices, gate_up, down)[0](x, *(t.requires_grad_() for t in rest))
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).bfloat16().float())
    assert x.grad is None
    for t, gradient in zip(rest, expected[1:], strict=True):
        assert torch.equal(t.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_without_gradients(dtype, monkeypatch) -> None:
    indices, gate_up, down, leaves = case("one token", dtype)
    indices[0, 2] = len(gate_up)
    op, exact = ops(indices, gate_up, down)
    monkeypatch.setattr(lora._Experts, "apply", None)  # the short way takes it
    with torch.no_grad():
        assert_close(op(*leaves), exact(*(t.double() for t in leaves)), "output", 2 * TOLERANCE[dtype])
        quantized = Quantized(gate_up), Quantized(down)
        assert torch.equal(ops(indices, *quantized)[0](*leaves), op(*leaves))
        assert not quantized[0].calls  # the chosen experts only


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant) -> None:
    indices, gate_up, down, leaves = case("several tokens", torch.float32)
    op, _ = ops(indices, gate_up, down, 0.2)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(op, *arguments, use_reentrant=reentrant)

    results = []
    for function in (op, checkpointed):
        torch.manual_seed(3)
        results.append(run(function, *leaves))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_reach_the_op() -> None:
    indices, gate_up, down, leaves = case("several tokens", torch.float32)
    op, _ = ops(indices, gate_up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = op(*leaves)
    assert torch.equal(found, op(*leaves))


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden", lambda x: x[None]),
        ("indices", lambda x: x.int()),
        ("gate_up", lambda x: x.half()),
        ("gate_up", lambda x: x.clone().requires_grad_()),
        ("down", lambda x: x.mT),
        ("A of lora_gate_up", lambda x: x[:, :, 1:]),
        ("B of lora_down", lambda x: x[:, :, 1:]),
        ("B of lora_down", lambda x: x.half()),
        ("dropout", lambda x: 1.0),
    ],
)
def test_wrong_arguments_are_named(argument, change) -> None:
    indices, gate_up, down, (x, weights, *factors) = case("several tokens", torch.float32)
    values = {"hidden": x, "indices": indices, "weights": weights, "gate_up": gate_up, "down": down, "dropout": 0.0}
    names = ("A of lora_gate_up", "B of lora_gate_up", "A of lora_down", "B of lora_down")
    values |= dict(zip(names, factors, strict=True))
    values[argument] = change(values[argument])
    a1, b1, a2, b2 = (values.pop(name) for name in names)
    with pytest.raises(ValueError, match=f"^{argument} .*allowed"):
        grouped_lora_experts(**values, lora_gate_up=(a1, b1), lora_down=(a2, b2))
