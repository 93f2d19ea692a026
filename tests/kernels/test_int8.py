"""INT8 ops against integers in int64 and fp32 arithmetic in numpy, to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.kernels.int8 import (
    dequantize_int8,
    int8_grouped_linear,
    int8_linear,
    quantize_activation_int8,
    quantize_int8,
    reference,
)
from tests.kernels.checks import DTYPES, assert_close, assert_compiles, error, run

SHAPES = [  # rows, out, in
    (1, 48, 256),  # decoding one token
    (17, 33, 97),  # odd sizes: two blocks of rows, a tail along the others
    (70, 130, 300),  # two blocks of outputs
    (3, 5, 1),  # a single column
    (2, 3, 3000),  # sums beyond 2^24
]
COUNTS = {  # rows of each expert, rows of none
    "one token": ([1, 0, 0, 1, 0, 1], 0),
    "empty experts and tails": ([0, 20, 0, 1, 35, 0], 0),
    "rows of no expert": ([3, 0, 18], 4),
    "no expert's rows": ([0, 0], 3),
    "no rows": ([0, 0], 0),
}


def weights(*shape, device="cpu", dtype=torch.bfloat16):
    return quantize_int8(torch.randn(shape, device=device).to(dtype) / shape[-1] ** 0.5)


def activations(rows, inputs, dtype, device="cpu"):
    """Of different sizes, with a row of zeros, a row of one value, and a tie between two codes in every other row."""
    x = torch.randn(rows, inputs) * torch.exp2(torch.randint(-20, 8, (rows, 1)).float())
    if inputs > 8:
        x[:, 0] = x.abs().amax(1)
        x[:, 3] = x[:, 0] * (2.5 / 127)
    x[5:6], x[6:7] = 0, -3.5
    return x.to(dtype).to(device)


def quantized(x):
    """By the definition, in numpy's fp32."""
    x = x.detach().float().cpu().numpy()
    scale = np.maximum(np.abs(x).max(1, keepdims=True) / np.float32(127), np.float32(2.0**-126))
    return np.rint(x / scale).astype(np.int64), scale


def exact_bits(x, codes, scale):
    """`int8_linear` with products in int64."""
    x_codes, x_scale = quantized(x)
    total = x_codes @ codes.long().cpu().numpy().T
    assert np.abs(total).max(initial=0) < 2**31
    y = total.astype(np.float32) * scale.float().cpu().numpy().T * x_scale
    return torch.from_numpy(y).to(x)


def offsets_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)


def exact_grouped_bits(x, codes, scale, counts):
    parts = [
        exact_bits(rows, codes[expert], scale[expert]) if len(rows) else x.new_empty(0, codes.shape[1])
        for expert, rows in enumerate(x[: sum(counts)].split(counts))
    ]
    return torch.cat([*parts, x.new_zeros(len(x) - sum(counts), codes.shape[1])])


@pytest.fixture(params=["triton", "with VNNI", "without VNNI"])
def implementation(request, monkeypatch):
    """Triton's kernels, or plain torch with either of its integer products."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    elif request.param == "without VNNI":
        monkeypatch.setattr(reference, "HAS_VNNI", False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_to_the_last_bit(shape, dtype, device, implementation) -> None:
    rows, outputs, inputs = shape
    x = activations(rows, inputs, dtype, device)
    if inputs == 3000:
        x = torch.full_like(x, 2.0)
        codes = torch.full((outputs, inputs), 127, dtype=torch.int8, device=device)
        codes[0], codes[1, ::2] = -127, 126
        scale = torch.rand(outputs, 1, device=device) * 1e-3
    else:
        codes, scale = weights(outputs, inputs, device=device, dtype=dtype)
    assert torch.equal(int8_linear(x, codes, scale), exact_bits(x, codes, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear_to_the_last_bit(counts, dtype, device, implementation) -> None:
    counts, others = COUNTS[counts]
    codes, scale = weights(len(counts), 33, 97, device=device)
    x = activations(sum(counts) + others, 97, dtype, device)
    y = int8_grouped_linear(x, codes, scale, offsets_of(counts, device))
    assert torch.equal(y, exact_grouped_bits(x, codes, scale, counts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_to_the_last_bit(dtype, device, implementation) -> None:
    for rows, columns in ((9, 300), (8, 2500), (0, 8)):  # one block of columns, two, no row
        x = activations(rows, columns, dtype, device)
        codes, scale = quantize_activation_int8(x)
        expected_codes, expected_scale = quantized(x)
        assert codes.dtype == torch.int8 and np.array_equal(codes.cpu().numpy(), expected_codes)
        assert scale.dtype == torch.float32 and np.array_equal(scale.cpu().numpy(), expected_scale)
        assert not rows or codes.abs().max() == 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value, device, implementation) -> None:
    codes, scale = weights(5, 64, device=device)
    x = torch.randn(3, 64, device=device)
    x[1, 7] = value
    y = int8_linear(x, codes, scale)
    assert not y[1].isfinite().any() and y[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_x(dtype, device, implementation) -> None:
    """That of the product with the weight which the codes stand for: what training around the layer wants."""
    codes, scale = weights(3, 48, 96, device=device)
    weight = codes.double() * scale.double()
    (_,), (grad,) = run(lambda x: int8_linear(x, codes[0], scale[0]), activations(9, 96, dtype, device))
    _, (expected,) = run(lambda x: x @ weight[0].T, activations(9, 96, torch.float64, device))
    assert grad.dtype == dtype
    assert_close(grad, expected, "gradient")

    counts = [4, 0, 20]
    offsets = offsets_of(counts, device)
    x = activations(27, 96, dtype, device)  # three rows of no expert
    (_,), (grad,) = run(lambda x: int8_grouped_linear(x, codes, scale, offsets), x)

    def exact(x):
        parts = [rows @ w.T for rows, w in zip(x[:24].split(counts), weight, strict=True)]
        return torch.cat([*parts, x.new_zeros(3, 48)])

    _, (expected,) = run(exact, x.double())
    assert_close(grad, expected, "gradient of grouped rows")
    assert not grad[24:].any()


def test_error_of_both_roundings(device, implementation) -> None:
    """A row's largest of 512 normal numbers is about 3.1: steps of 3.1 / 127, rounded to a part of sqrt(12), for x and
    for the weight: 1.0 % together."""
    weight, x = torch.randn(64, 512, device=device), torch.randn(33, 512, device=device)
    found = error(int8_linear(x, *quantize_int8(weight)), x.double() @ weight.double().T)
    assert 0.006 < found < 0.013


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), exponent=st.integers(-8, 10))
def test_quantization_error(seed, dtype, exponent) -> None:
    """At most half a step, of a scale that was rounded to the weight's dtype."""
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed)).mul(2.0**exponent).to(dtype)
    codes, scale = quantize_int8(weight)
    assert codes.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (2, 3, 1)
    assert codes.abs().amax(-1).eq(127).all()
    steps = (weight.double() - dequantize_int8(codes, scale, torch.float64)) / scale.double()
    assert steps.abs().max() <= 0.5 + 127 * torch.finfo(dtype).eps


@given(seed=st.integers(0, 2**32))
def test_quantizing_loses_no_integer(seed) -> None:
    values = torch.randint(-127, 128, (3, 40), generator=torch.Generator().manual_seed(seed))
    values[:, seed % 40] = 127
    codes, scale = quantize_int8(values.double())
    assert torch.equal(codes.long(), values) and torch.equal(scale, torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(dequantize_int8(codes, scale), values.double())


def test_zeros(device, implementation) -> None:
    codes, scale = quantize_int8(torch.zeros(2, 64, dtype=torch.bfloat16, device=device))
    assert (scale > 0).all() and not dequantize_int8(codes, scale).any()
    assert not int8_linear(torch.zeros(2, 64, device=device), *weights(3, 64, device=device)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_dequantizing_rounds_once(scale_dtype, dtype) -> None:
    codes = torch.randint(-128, 128, (2, 33, 64), dtype=torch.int8)
    scale = torch.rand(2, 33, 1).to(scale_dtype)
    expected = (codes.double() * scale.double()).to(dtype)
    assert torch.equal(dequantize_int8(codes, scale, dtype), expected)
    assert dequantize_int8(codes, scale).dtype == scale_dtype


def test_more_than_two_dimensions_strides_and_autocast(device, implementation) -> None:
    codes, scale = weights(33, 96, device=device)
    expected = lambda x: exact_bits(x.reshape(-1, 96), codes, scale).view(*x.shape[:-1], 33)  # noqa: E731
    x = torch.randn(2, 3, 96, device=device).to(torch.bfloat16)
    assert torch.equal(int8_linear(x, codes, scale), expected(x))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = int8_linear(x.float(), codes, scale)
    assert torch.equal(y, expected(x.float()))
    wide = torch.randn(5, 192, device=device, dtype=torch.bfloat16)
    for x in (wide[:, :96], wide[:, ::2], wide.t()[:96, :3].t()):
        assert torch.equal(int8_linear(x, codes, scale), expected(x))
        y = int8_grouped_linear(x, codes[None], scale[None], offsets_of([len(x)], device))
        assert torch.equal(y, expected(x))
    codes, scale = weights(2, 96, 33, device=device)  # as a transposed weight
    codes = codes.mT
    scale = scale[:, :33]
    y = int8_grouped_linear(wide[:, :96], codes, scale, offsets_of([2, 3], device))
    assert torch.equal(y, exact_grouped_bits(wide[:, :96], codes, scale, [2, 3]))


def test_only_experts_with_rows_are_read(monkeypatch) -> None:
    codes, scale = weights(4, 8, 32)
    read = []
    product = reference.int8_product
    monkeypatch.setattr(reference, "int8_product", lambda a, b, out: read.append(b.data_ptr()) or product(a, b, out))
    int8_grouped_linear(torch.randn(3, 32), codes, scale, offsets_of([0, 1, 0, 2], "cpu"))
    assert read == [codes[1].data_ptr(), codes[3].data_ptr()]


def test_a_tile_writes_its_own_rows(device, triton_kernels, monkeypatch) -> None:
    """The interpreter runs tiles in order, so the next one would hide what one writes past its end: here the last
    runs first."""
    from deepseek_v3.kernels.int8 import triton_impl

    tiles = triton_impl.expert_tiles
    monkeypatch.setattr(triton_impl, "expert_tiles", lambda *a: tiles(*a)._replace(table=tiles(*a).table.flip(1)))
    counts = [5, 0, 20, 3]
    codes, scale = weights(4, 33, 96, device=device)
    x = activations(28, 96, torch.float32, device)
    y = int8_grouped_linear(x, codes, scale, offsets_of(counts, device))
    assert torch.equal(y, exact_grouped_bits(x, codes, scale, counts))


def test_no_rows(device, implementation) -> None:
    codes, scale = weights(33, 64, device=device)
    assert int8_linear(torch.randn(2, 0, 64, device=device), codes, scale).shape == (2, 0, 33)


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    codes, scale = weights(5, 64, device=device)
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    assert torch.equal(int8_linear(x, codes, scale), exact_bits(x, codes, scale))


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    codes, scale = weights(2, 33, 64, device=device)
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    offsets = offsets_of([1, 2], device)
    assert_compiles(lambda x: int8_linear(x, codes[0], scale[0]), x)
    assert_compiles(lambda x: int8_grouped_linear(x, codes, scale, offsets), x)
    ops = torch.ops.deepseek_v3
    torch.library.opcheck(ops.quantize_activation_int8.default, (x,))
    torch.library.opcheck(ops.int8_linear_backward.default, (x[:, :33].contiguous(), codes, scale, offsets))
    torch.library.opcheck(ops.int8_linear.default, (x.requires_grad_(), codes, scale, offsets))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, s, o: quantize_int8(torch.zeros(2, 64, dtype=torch.int32)), "torch.int32"),
        (lambda c, s, o: quantize_int8(torch.zeros(64)), r"weight is \[64\]"),
        (lambda c, s, o: dequantize_int8(c.int(), s), "codes is torch.int32"),
        (lambda c, s, o: dequantize_int8(c, s[..., 0]), r"scale torch.bfloat16 \[2, 4\]"),
        (lambda c, s, o: dequantize_int8(c, s.int()), r"scale torch.int32"),
        (lambda c, s, o: quantize_activation_int8(c[0]), r"x is torch.int8 \[4, 64\]"),
        (lambda c, s, o: int8_linear(torch.zeros(1, 32), c[0], s[0]), r"x is \[1, 32\] and codes \[4, 64\]"),
        (lambda c, s, o: int8_linear(torch.zeros(1, 64), c, s), r"codes \[2, 4, 64\]"),
        (lambda c, s, o: int8_grouped_linear(torch.zeros(1, 64), c[0], s[0], o), r"codes \[4, 64\]"),
        (lambda c, s, o: int8_grouped_linear(torch.zeros(1, 64), c, s, o.long()), r"offsets is torch.int64 \[3\]"),
        (lambda c, s, o: int8_grouped_linear(torch.zeros(1, 64), c, s, o[1:]), r"\[2\]; allowed: int32 \[3\]"),
    ],
)
def test_wrong_input_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(*weights(2, 4, 64), offsets_of([1, 0], "cpu"))
