from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.kernels.dispatch import kernels
from deepseek_v3.kernels.fp8_quant import (
    dequantize_weight_fp8,
    quantize_activation_fp8,
    quantize_activation_fp8_transposed,
    quantize_weight_fp8,
    reference,
    triton_impl,
)
from tests.kernels.checks import DTYPES

E4M3 = torch.float8_e4m3fn
SHAPES = [
    (1, 64),  # one row, one tile that is not full
    (130, 97),  # odd: masked columns, and a second tile along the rows
    (576, 128),  # the rows of kv_a_proj_with_mqa: half a block at the end
    (40, 300),  # the last tile of 128 columns has 44
]
QUANTIZERS = {
    "activation": quantize_activation_fp8,
    "transposed": quantize_activation_fp8_transposed,
    "weight": quantize_weight_fp8,
    "weight, transposed": partial(quantize_weight_fp8, transpose=True),
}


def inputs(shape, dtype, device):
    """Rows of very different sizes; the first is zero, as are the first 128 columns of every fifth."""
    x = torch.randn(shape, device=device) * torch.exp2(torch.randint(-12, 12, (shape[0], 1), device=device).float())
    x[0] = 0
    x[::5, :128] = 0
    return x.to(dtype)


def assert_same_bits(found, expected) -> None:
    """Codes and scales are equal to the last bit; NaN equals NaN, whose sign no conversion promises."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a.float().cpu(), b.float().cpu(), rtol=0, atol=0, equal_nan=True)


def check_against_reference(quantize, *arguments, **options):
    with kernels("reference"):
        expected = quantize(*arguments, **options)
    with kernels("triton"):
        found = quantize(*arguments, **options)
    assert_same_bits(found, expected)
    return found


def dequantized(codes, scale):
    """In fp64, by the definition: the tile sizes follow from the shapes."""
    row = torch.arange(codes.shape[-2]) // (1 if scale.shape[-2] == codes.shape[-2] else 128)
    return codes.double() * scale.double()[..., row, :][..., torch.arange(codes.shape[-1]) // 128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_equals_the_reference_bit_for_bit(name, power_of_two, shape, dtype, device) -> None:
    codes, scale = check_against_reference(QUANTIZERS[name], inputs(shape, dtype, device), power_of_two=power_of_two)
    if power_of_two:
        assert torch.frexp(scale)[0].eq(0.5).all()
    assert codes.stride(1) == 1 and scale.gt(0).all()


@pytest.mark.parametrize(
    "counts",
    [
        [3],  # one expert
        [0, 128, 0, 1, 129, 0],  # empty experts, full tiles, one row, one row in a second tile
        [0, 0, 200, 0],  # all rows on one expert
        [0, 0],  # no rows at all
    ],
)
def test_tiles_of_experts(counts, device) -> None:
    x = inputs((max(1, sum(counts)), 160), torch.bfloat16, device)[: sum(counts)]
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    codes, scale = check_against_reference(quantize_activation_fp8_transposed, x, offsets)
    assert codes.shape == (160, (sum(counts) // 128 + len(counts)) * 128) and scale.shape[1] * 128 == codes.shape[1]
    bounds = offsets.tolist()
    used = torch.zeros(codes.shape[1], dtype=torch.bool)
    for expert, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        first = (begin // 128 + expert) * 128
        alone, alone_scale = quantize_activation_fp8_transposed(x[begin:end])
        assert_same_bits([codes[:, first : first + end - begin]], [alone])
        assert_same_bits([scale[:, first // 128 : first // 128 + alone_scale.shape[1]]], [alone_scale])
        assert not used[first : first + alone_scale.shape[1] * 128].any()
        used[first : first + end - begin] = True
    assert codes.float().cpu()[:, ~used].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denormal_and_huge_numbers(dtype, device) -> None:
    sizes = [2.0**-149, 2.0**-133, 2.0**-126, 447 * 2.0**-126, 1e-30, 1e30, 3e38]
    x = (torch.rand(7, 256, dtype=torch.float64) * 2 - 1) * torch.tensor(sizes, dtype=torch.float64)[:, None]
    x = x.to(dtype).to(device)
    for quantize in QUANTIZERS.values():
        check_against_reference(quantize, x)
    codes, scale = quantize_activation_fp8(x)
    assert scale.min() == 2.0**-126 and codes.float().isfinite().all()
    largest_error = (dequantized(codes, scale) - x.double()).abs().max(1).values
    assert largest_error.le(torch.tensor(sizes) / 27 + 2.0**-136).all()  # half of the spacing 32 at 448, and denormal


def test_nan_and_infinity(device) -> None:
    x = torch.randn(128, 256, device=device)
    x[3, 5] = float("nan")
    x[4, :128] = float("nan")
    x[6, 200], x[7, 7] = float("inf"), -float("inf")
    for quantize in QUANTIZERS.values():
        check_against_reference(quantize, x)
    codes, scale = quantize_activation_fp8(x)
    lost = dequantized(codes.cpu(), scale.cpu()).isnan()
    expected = torch.zeros(128, 256, dtype=torch.bool)
    expected[3, 5] = True
    expected[4, :128] = expected[6, 128:] = expected[7, :128] = True
    assert torch.equal(lost, expected)


def test_reference_by_search_in_all_codes() -> None:
    """Against the definition: the e4m3 number nearest to x / scale, found among all 254 finite ones."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
    values = values[values.isfinite()].unique()  # ascending; one zero
    even = values.float().to(E4M3).view(torch.uint8) % 2 == 0
    x = inputs((260, 300), torch.float32, "cpu")
    scales = {
        (1, 128): reference.quantize_activation(x, False),
        (128, 128): reference.quantize_weight(x, False, False),
    }
    for (rows, columns), (codes, scale) in scales.items():
        for i, block in enumerate(x.split(rows)):
            for j, tile in enumerate(block.split(columns, dim=1)):
                assert scale[i, j] == max(tile.abs().max().numpy() / 448, 2.0**-126)
        factor = (1 / scale).repeat_interleave(rows, 0)[:260].repeat_interleave(columns, 1)[:, :300]
        exact = (x * factor).double()
        upper = torch.searchsorted(values, exact).clamp(1, len(values) - 1)
        below, above = exact - values[upper - 1], values[upper] - exact
        pick_upper = (above < below) | ((above == below) & even[upper])
        assert torch.equal(codes.double(), values[torch.where(pick_upper, upper, upper - 1)])


def test_expert_weights_and_dequantization(device) -> None:
    weight = torch.randn(3, 200, 300, device=device)
    weight[1, :128, 128:256] = 0
    codes, scale = check_against_reference(quantize_weight_fp8, weight)
    assert scale.shape == (3, 2, 3)
    for expert in range(3):
        assert_same_bits((codes[expert], scale[expert]), quantize_weight_fp8(weight[expert]))
    assert_same_bits(
        check_against_reference(partial(quantize_weight_fp8, transpose=True), weight), (codes.mT, scale.mT)
    )
    for dtype in DTYPES:  # as the checkpoint reader does it: the product in fp32, then one rounding
        with kernels("triton"):
            found = dequantize_weight_fp8(codes, scale, dtype)
        assert_same_bits([found], [dequantized(codes.cpu(), scale.cpu()).float().to(dtype)])
        assert found[1, :128, 128:256].eq(0).all()
        assert_same_bits([found], [reference.dequantize(codes, scale, dtype)])


def test_layouts_of_the_input(device, triton_kernels) -> None:
    x = inputs((40, 300), torch.bfloat16, device)
    wide = torch.cat([x, x], 1)[:, :300]  # a slice of wider rows, read in place
    for quantize in QUANTIZERS.values():
        assert_same_bits(quantize(wide), quantize(x))
        assert_same_bits(quantize(x.T.contiguous().T), quantize(x))
    assert_same_bits(quantize_activation_fp8(x[:1].expand(40, 300)), quantize_activation_fp8(x[:1].repeat(40, 1)))


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    for quantize in (quantize_activation_fp8, quantize_activation_fp8_transposed):
        assert_same_bits(quantize(x), quantize(x.clone()))


numbers = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.integers(1, 5), st.integers(1, 300))


def drawn(seed: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    # powers up to 2^6 apart within a tile: also numbers whose codes are denormal
    return (x * torch.exp2(-torch.randint(0, 13, (rows, columns), generator=generator) / 2)).to(dtype)


@given(numbers, st.booleans())
def test_rounding_error(given_numbers, power_of_two) -> None:
    """Half a unit in the last place: 2^-4 of the number (3 bits of mantissa), 2^-10 where codes are denormal."""
    x = drawn(*given_numbers)
    for quantize in (reference.quantize_activation, partial(reference.quantize_weight, transpose=False)):
        codes, scale = quantize(x, power_of_two=power_of_two)
        unit = dequantized(torch.ones_like(codes, dtype=torch.float32), scale)
        bound = torch.maximum(x.double().abs() * 2.0**-4, unit * 2.0**-10) * (1 + 1e-6)  # 1e-6: fp32's own rounding
        assert (dequantized(codes, scale) - x.double()).abs().le(bound).all()


@given(numbers, st.integers(-12, 12))
def test_powers_of_two_only_move_the_scale(given_numbers, exponent) -> None:
    seed, _, rows, columns = given_numbers
    x = drawn(seed, torch.float32, rows, columns)  # in fp16 the scaled numbers would round
    for quantize in (reference.quantize_activation, partial(reference.quantize_weight, transpose=False)):
        for power_of_two in (False, True):
            codes, scale = quantize(x, power_of_two=power_of_two)
            scaled_codes, scaled = quantize(x * 2.0**exponent, power_of_two=power_of_two)
            assert_same_bits((scaled_codes, scaled), (codes, scale * 2.0**exponent))


@given(numbers)
def test_quantizing_again_changes_nothing(given_numbers) -> None:
    """With scales that are powers of two: codes times scale are exact, and a smaller scale only adds room."""
    for quantize in (reference.quantize_activation, partial(reference.quantize_weight, transpose=False)):
        codes, scale = quantize(drawn(*given_numbers), power_of_two=True)
        values = reference.dequantize(codes, scale, torch.float32)
        again, scale_again = quantize(values, power_of_two=True)
        assert torch.equal(reference.dequantize(again, scale_again, torch.float32), values)
        if codes.float().abs().max() > 224 and scale.numel() == 1:  # the largest code does not fit a smaller scale
            assert_same_bits((again, scale_again), (codes, scale))


def test_no_gradient(device, triton_kernels) -> None:
    x = torch.randn(4, 64, device=device, requires_grad=True)
    for quantize in QUANTIZERS.values():
        assert not any(output.requires_grad for output in quantize(x))


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    x, offsets = torch.randn(5, 64, device=device), torch.tensor([0, 2, 5], dtype=torch.int32, device=device)

    def quantize_all(x, offsets):
        outputs = [output for quantize in QUANTIZERS.values() for output in quantize(x)]
        restored = dequantize_weight_fp8(*quantize_weight_fp8(x), torch.bfloat16)
        return *outputs, *quantize_activation_fp8_transposed(x, offsets), restored

    torch._dynamo.reset()
    compiled = torch.compile(quantize_all, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x, offsets), quantize_all(x, offsets))
    ops = torch.ops.deepseek_v3
    for arguments in [(x, None, True, False, False), (x, None, False, True, True), (x, offsets, True, True, False)]:
        torch.library.opcheck(ops.quantize_activation_fp8.default, arguments)
    torch.library.opcheck(ops.quantize_weight_fp8.default, (x[None], True, False))
    arguments, checks = (*quantize_weight_fp8(x), torch.bfloat16), ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        ops.dequantize_weight_fp8.default, arguments, test_utils=checks
    )  # test_schema: no FP8 inputs


def test_errors(monkeypatch) -> None:
    x = torch.randn(4, 200)
    codes, scale = quantize_weight_fp8(x)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[200\]; allowed: floating point \[M, K\]"):
        quantize_activation_fp8(x[0])
    with pytest.raises(ValueError, match=r"offsets is torch.int64 \[2\]; allowed: int32"):
        quantize_activation_fp8_transposed(x, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"weight is torch.int64 \[4, 200\]"):
        quantize_weight_fp8(x.long())
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[4, 200\]; allowed: torch.float8_e4m3fn"):
        dequantize_weight_fp8(x, scale)
    with pytest.raises(
        ValueError, match=r"scale_inv is torch.float32 \[1, 1\]; a weight \[4, 200\] needs fp32 \[1, 2\]"
    ):
        dequantize_weight_fp8(codes, scale[:, :1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(RuntimeError, match="8.9 or higher, NVIDIA A100 has 8.0"):
        triton_impl.check_device.__wrapped__(torch.device("cuda"))
