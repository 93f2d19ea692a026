import pytest
import torch

from deepseek_v3.kernels.dispatch import kernels
from deepseek_v3.kernels.fp8_gemm import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_grouped_linear,
    fp8_grouped_wgrad,
    fp8_linear,
)
from deepseek_v3.kernels.fp8_quant import (
    quantize_activation_fp8,
    quantize_activation_fp8_transposed,
    quantize_weight_fp8,
)
from tests.kernels.checks import DTYPES, assert_close, assert_compiles, error, run

SHAPES = [  # M, N, K
    (1, 40, 128),  # one token, one tile along K
    (33, 97, 200),  # odd rows and columns, and a short last tile
    (130, 576, 256),  # two row tiles, and half a block at the end of the weight's rows
    (300, 130, 97),  # three row tiles, less than one tile along K
]
COUNTS = [
    [5],  # one expert
    [0, 128, 0, 1, 129, 0],  # empty experts, a full tile, one row, one row in a second tile
    [0, 0, 200, 0],  # all rows on one expert
]
# e4m3 rounds to 1/16 at most, 2.6 % in the root mean square of a normal distribution. Both operands of a product are
# rounded, independently: sqrt(2) times as much, 3.7 %. 4 % is 28 dB below the signal.
QUANTIZED = 0.04


def fp32_tolerance(device) -> float:
    """Products of two codes are exact in fp32, but Hopper's tensor cores keep about 14 bits of a tile's sum."""
    return 1e-5 if device.type == "cpu" else 1e-3


def dequantized(codes, scale):
    """In fp64, by the definition: the tile sizes follow from the shapes."""
    row = torch.arange(codes.shape[-2], device=codes.device) // (1 if scale.shape[-2] == codes.shape[-2] else 128)
    column = torch.arange(codes.shape[-1], device=codes.device) // 128
    return codes.double() * scale.double()[..., row, :][..., column]


def normal(*shape, device, dtype=torch.float32):
    """Normally distributed numbers whose size differs between the rows, with a tile of zeros."""
    x = torch.randn(shape, device=device) * torch.exp2(torch.randint(-4, 4, (*shape[:-1], 1), device=device).float())
    x[..., : shape[-2] // 2, :128] = 0
    return x.to(dtype)


def offsets_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)


def by_expert(product, offsets, *operands):
    """`product(expert, rows of each operand)` for every expert."""
    bounds = offsets.tolist()
    return [
        product(e, *(x[i:j] for x in operands)) for e, (i, j) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("of_b", [quantize_weight_fp8, quantize_activation_fp8], ids=["blocks", "tiles"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_against_fp64(shape, of_b, implementation, device) -> None:
    rows, columns, inner = shape
    with kernels(implementation):
        a = quantize_activation_fp8(normal(rows, inner, device=device))
        b = of_b(normal(columns, inner, device=device))
        exact = dequantized(*a) @ dequantized(*b).T
        assert_close(fp8_gemm(*a, *b, torch.float32), exact, "fp32", fp32_tolerance(device))
        y = fp8_gemm(*a, *b)
        assert y.dtype == torch.bfloat16
        assert_close(y, exact, "bf16")


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_against_fp64(counts, implementation, device) -> None:
    offsets = offsets_of(counts, device)
    x, grad = normal(sum(counts), 200, device=device), normal(sum(counts), 130, device=device)
    weight = normal(len(counts), 130, 200, device=device)
    with kernels(implementation):
        a, b, b_t = (
            quantize_activation_fp8(x),
            quantize_weight_fp8(weight),
            quantize_weight_fp8(weight, transpose=True),
        )
        exact_b = dequantized(*b)
        y = fp8_grouped_gemm(*a, *b, offsets, torch.float32)
        expected = torch.cat(by_expert(lambda e, rows: rows @ exact_b[e].T, offsets, dequantized(*a)))
        assert_close(y, expected, "forward", fp32_tolerance(device))

        g = quantize_activation_fp8(grad)
        grad_x = fp8_grouped_gemm(*g, *b_t, offsets)
        expected = torch.cat(by_expert(lambda e, rows: rows @ exact_b[e], offsets, dequantized(*g)))
        assert_close(grad_x, expected, "gradient of the input")

        g_t, x_t = (quantize_activation_fp8_transposed(t, offsets) for t in (grad, x))
        grad_weight = fp8_grouped_wgrad(*g_t, *x_t, offsets, torch.float32)
        starts = [(begin // 128 + e) * 128 for e, begin in enumerate(offsets.tolist()[:-1])]
        exact_g, exact_x = dequantized(*g_t), dequantized(*x_t)
        expected = [exact_g[:, i : i + n] @ exact_x[:, i : i + n].T for i, n in zip(starts, counts, strict=True)]
        assert_close(grad_weight, torch.stack(expected), "gradient of the weight", fp32_tolerance(device))
        assert all(grad_weight[e].eq(0).all() for e, count in enumerate(counts) if count == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_linear_against_unquantized_fp64(implementation, dtype, device) -> None:
    x = torch.randn(3, 50, 200, device=device).to(dtype)
    weight = (torch.randn(130, 200, device=device) / 14).to(dtype)
    rows, weights = torch.randn(150, 200, device=device).to(dtype), torch.stack([weight, -weight, 2 * weight])
    offsets = offsets_of([100, 0, 50], device)

    def exact_grouped(x, weight, offsets):
        return torch.cat(by_expert(lambda e, rows: rows @ weight[e].T, offsets, x))

    with kernels(implementation):
        for op, exact, arguments in [
            (fp8_linear, torch.nn.functional.linear, (x, weight)),
            (fp8_grouped_linear, exact_grouped, (rows, weights, offsets)),
        ]:
            outputs, grads = run(op, *arguments)
            wide = [t.double() if t.is_floating_point() else t for t in arguments]
            exact_outputs, exact_grads = run(exact, *wide)
            for found, expected in zip(outputs + grads[:2], exact_outputs + exact_grads[:2], strict=True):
                assert found.dtype == dtype
                assert 0.005 < error(found, expected) < QUANTIZED  # the lower bound: it is quantized


def test_linear_is_its_three_products(device, triton_kernels) -> None:
    """The same bits as the quantizers and products called one by one."""
    x, weight = normal(150, 200, device=device), normal(130, 200, device=device, dtype=torch.bfloat16)
    (y,), (grad_x, grad_weight) = run(fp8_linear, x, weight)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(y)  # as `run` draws
    transposed = quantize_activation_fp8_transposed
    expected_x = fp8_gemm(*quantize_activation_fp8(grad), *quantize_weight_fp8(weight, transpose=True), torch.float32)
    assert torch.equal(y, fp8_gemm(*quantize_activation_fp8(x), *quantize_weight_fp8(weight), torch.float32))
    assert torch.equal(grad_x, expected_x)
    assert torch.equal(grad_weight, fp8_gemm(*transposed(grad), *transposed(x), torch.bfloat16))


def test_linear_keeps_one_byte_per_element(device, triton_kernels) -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(128, 256, device=device, requires_grad=True)
        weight = torch.randn(64, 256, device=device, requires_grad=True)
        fp8_linear(x, weight)
        kept = {t.data_ptr(): t.nbytes for t in saved if t.data_ptr() != weight.data_ptr()}
        assert sum(kept.values()) == x.numel() + 4 * 256  # codes, and one scale per 128 rows
        saved.clear()
        fp8_linear(x, weight.detach()).sum().backward()  # a frozen weight needs nothing of x
        assert sum(t.numel() for t in saved if t.data_ptr() != weight.data_ptr()) == 0 and x.grad is not None


@pytest.mark.parametrize("frozen", [0, 1])
def test_linear_with_a_frozen_operand(frozen, device, triton_kernels) -> None:
    x, weight = torch.randn(5, 64, device=device), torch.randn(7, 64, device=device)
    _, expected = run(fp8_linear, x, weight)
    leaves = [x.requires_grad_(frozen != 0), weight.requires_grad_(frozen != 1)]
    y = fp8_linear(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(y))
    assert leaves[frozen].grad is None and torch.equal(leaves[1 - frozen].grad, expected[1 - frozen])


def test_triton_against_the_reference(device) -> None:
    """Same codes, so only the order of the sums differs; a step of forward and backward, grouped."""
    offsets = offsets_of([3, 0, 140], device)
    arguments = normal(143, 160, device=device), normal(3, 40, 160, device=device), offsets
    with kernels("triton"):
        found = run(fp8_grouped_linear, *arguments)
    with kernels("reference"):
        expected = run(fp8_grouped_linear, *arguments)
    for a, b in zip(found[0] + found[1][:2], expected[0] + expected[1][:2], strict=True):
        assert_close(a, b.double(), "grouped linear", fp32_tolerance(device))
    with kernels("triton"), torch.no_grad():
        assert torch.equal(fp8_grouped_linear(*arguments), found[0][0])


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_no_rows(implementation, device) -> None:
    with kernels(implementation):
        (y,), (grad_x, grad_weight) = run(
            fp8_linear, torch.randn(0, 64, device=device), torch.ones(8, 64, device=device)
        )
        assert y.shape == (0, 8) and grad_x.shape == (0, 64) and grad_weight.eq(0).all()
        offsets = offsets_of([0, 0], device)
        arguments = torch.randn(0, 64, device=device), torch.ones(2, 8, 64, device=device), offsets
        (y,), (grad_x, grad_weight, _) = run(fp8_grouped_linear, *arguments)
        assert y.shape == (0, 8) and grad_x.shape == (0, 64) and grad_weight.eq(0).all()


def test_zeros_stay_zeros(device, triton_kernels) -> None:
    """Through scales of 2^-126, whose products underflow: zero and not NaN."""
    x, weight = torch.zeros(3, 256, device=device), torch.zeros(5, 256, device=device)
    outputs, grads = run(fp8_linear, x, weight)
    assert all(t.eq(0).all() for t in outputs + grads)
    outputs, grads = run(fp8_linear, x, torch.randn(5, 256, device=device))
    assert outputs[0].eq(0).all() and grads[1].eq(0).all() and grads[0].ne(0).any()


def test_strides_of_operands_and_scales(device, triton_kernels) -> None:
    a, a_scale = quantize_activation_fp8(normal(40, 256, device=device))
    b, b_scale = quantize_weight_fp8(normal(200, 256, device=device))
    expected = fp8_gemm(a, a_scale, b, b_scale)
    assert torch.equal(fp8_gemm(a, a_scale.contiguous(), b, b_scale.T.contiguous().T), expected)
    wide = torch.zeros(200, 2 * 256, dtype=b.dtype, device=device)
    wide[:, :256] = b
    assert torch.equal(fp8_gemm(a.T.contiguous().T, a_scale, wide[:, :256], b_scale), expected)


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 2 GiB of address space only
    a, a_scale = quantize_activation_fp8(torch.randn(3, 128, device=device))
    b = quantize_activation_fp8(torch.randn(3, 128, device=device))
    far = torch.empty(2**31 + 128, dtype=a.dtype, device=device).as_strided((3, 128), (2**30, 1))
    far.copy_(a)
    assert torch.equal(fp8_gemm(far, a_scale, *b), fp8_gemm(a, a_scale, *b))
    assert torch.equal(fp8_gemm(*b, far, a_scale), fp8_gemm(*b, a, a_scale))


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    x, weight = torch.randn(6, 64, device=device), torch.randn(8, 64, device=device)
    offsets = offsets_of([2, 4], device)
    assert_compiles(fp8_linear, x, weight)
    assert_compiles(fp8_grouped_linear, x, torch.stack([weight, -weight]), offsets)
    ops = torch.ops.deepseek_v3
    checks = ("test_autograd_registration", "test_faketensor")  # the others add and compare FP8 tensors: torch cannot
    a, b, t = quantize_activation_fp8(x), quantize_weight_fp8(weight), quantize_activation_fp8_transposed(x, offsets)
    torch.library.opcheck(ops.fp8_gemm.default, (*a, *b, None, torch.bfloat16), test_utils=checks)
    torch.library.opcheck(ops.fp8_grouped_wgrad.default, (*t, *t, offsets, torch.float32), test_utils=checks)
    arguments = (x.requires_grad_(), weight.requires_grad_(), None, True)
    torch.library.opcheck(ops.fp8_linear.default, arguments, test_utils=checks)


def test_errors() -> None:
    a, a_scale = quantize_activation_fp8(torch.randn(4, 256))
    b, b_scale = quantize_weight_fp8(torch.randn(200, 256))
    offsets = offsets_of([1, 3], "cpu")
    with pytest.raises(ValueError, match=r"a is torch.float32 \[4, 256\]; allowed: 2-D torch.float8_e4m3fn"):
        fp8_gemm(a.float(), a_scale, b, b_scale)
    with pytest.raises(ValueError, match=r"b_scale is .*\[2, 1\]; b \[200, 256\] needs fp32 \[200, 2\] or \[2, 2\]"):
        fp8_gemm(a, a_scale, b, b_scale[:, :1])
    with pytest.raises(ValueError, match=r"b is \[200, 128\]; a \[4, 256\] needs \[N, 256\]"):
        fp8_gemm(a, a_scale, b[:, :128], b_scale[:, :1])
    with pytest.raises(ValueError, match=r"b is torch.float8_e4m3fn \[1, 200, 256\]; needed: .* \[2, N, 256\]"):
        fp8_grouped_gemm(a, a_scale, b[None], b_scale[None], offsets)
    with pytest.raises(ValueError, match=r"b_scale is .* \[1, 2, 2\]; b \[2, 200, 256\] needs fp32 \[2, 2, 2\]"):
        fp8_grouped_gemm(a, a_scale, torch.stack([b, b]), b_scale[None], offsets)
    with pytest.raises(ValueError, match=r"offsets is torch.int64 \[3\]"):
        fp8_grouped_gemm(a, a_scale, b, b_scale, offsets.long())
    with pytest.raises(ValueError, match=r"x_t is \[4, 256\] and grad_t \[4, 128\]"):
        fp8_grouped_wgrad(a[:, :128], a_scale[:, :1], a, a_scale, offsets)
    with pytest.raises(ValueError, match=r"weight is \[3, 5\]; x \[2, 4\] needs \[N, 4\]"):
        fp8_linear(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"weight is \[3, 7, 4\]; x \[2, 4\] needs \[2, N, 4\]"):
        fp8_grouped_linear(torch.zeros(2, 4), torch.zeros(3, 7, 4), offsets)
