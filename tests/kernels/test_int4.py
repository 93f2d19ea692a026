import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.kernels.int4 import (
    GROUP_SIZES,
    dequantize_int4,
    int4_grouped_linear,
    int4_linear,
    pack_int4_for_cpu,
    quantize_int4,
    reference,
)
from tests.kernels.checks import DTYPES, assert_close, assert_compiles, compare

SHAPES = [  # rows, out, in, group size
    (1, 48, 256, 128),  # decoding one token
    (3, 33, 128, 128),  # odd number of outputs, a single group
    (17, 33, 512, 32),  # blocks of inputs smaller than usual; few programs, so the inputs are split
    (40, 16, 256, 64),
    (69, 130, 256, 256),  # a block of rows and a tail, a block of outputs and a tail; two blocks of inputs per group
    (300, 33, 128, 128),  # so many rows that the weight is dequantized first
]


COUNTS = {  # rows of each expert, rows of none
    "one token": ([1, 0, 0, 1, 0, 1], 0),
    "empty experts and tails": ([0, 20, 0, 1, 35, 0], 0),
    "many rows": ([130, 70], 0),
    "rows of no expert": ([3, 0, 18], 4),
    "no expert's rows": ([0, 0], 3),
    "no rows": ([0, 0], 0),
}


def weights(outputs, inputs, group_size, device, dtype=torch.bfloat16, experts=()):
    weight = torch.randn(*experts, outputs, inputs, device=device).to(dtype) / inputs**0.5
    return quantize_int4(weight, group_size)


def exact_weight(packed, scale):
    """`q * scale` in fp64, value by value."""
    nibbles = torch.stack([(packed >> 4 * j) & 15 for j in range(8)], dim=-1).flatten(-2).double() - 8
    return nibbles * scale.double().repeat_interleave(nibbles.shape[-1] // scale.shape[-1], dim=-1)


def exact_linear(x, packed, scale):
    return x @ exact_weight(packed, scale).t()


def offsets_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)


def exact_grouped(x, packed, scale, counts):
    weight = exact_weight(packed, scale)
    parts = [rows @ matrix.T for rows, matrix in zip(x[: sum(counts)].split(counts), weight, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - sum(counts), packed.shape[1])])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, device, triton_kernels) -> None:
    rows, outputs, inputs, group_size = shape
    packed, scale = weights(outputs, inputs, group_size, device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    compare(lambda x: int4_linear(x, packed, scale), lambda x: exact_linear(x, packed, scale), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_elements", [1, 10 * 256, 2**20])
def test_reference_against_fp64(chunk_elements, dtype, monkeypatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk_elements)
    packed, scale = weights(33, 256, 64, "cpu")
    x = torch.randn(5, 256).to(dtype)
    compare(lambda x: reference.int4_linear(x, packed, scale), lambda x: exact_linear(x, packed, scale), x)


@pytest.mark.parametrize("implementation", ["triton", "torch", "torch's kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_against_fp64(counts, dtype, implementation, device, request) -> None:
    counts, others = COUNTS[counts]
    packed, scale = weights(33, 128, 32 if others else 64, device, experts=(len(counts),))
    cpu_packed = None
    if implementation == "triton":
        request.getfixturevalue("triton_kernels")
    elif implementation == "torch's kernel":
        cpu_packed = pack_int4_for_cpu(packed.cpu(), scale.cpu())
        device, packed, scale = "cpu", packed.cpu(), scale.cpu()
    offsets = offsets_of(counts, device)
    x = torch.randn(sum(counts) + others, 128, device=device).to(dtype)
    compare(
        lambda x: int4_grouped_linear(x, packed, scale, offsets, cpu_packed),
        lambda x: exact_grouped(x, packed, scale, counts),
        x,
    )
    with torch.no_grad():
        assert not int4_grouped_linear(x, packed, scale, offsets, cpu_packed)[sum(counts) :].any()


def test_only_experts_with_rows_are_dequantized(monkeypatch) -> None:
    packed, scale = weights(8, 64, 32, "cpu", experts=(4,))
    read, dequantize = [], reference.dequantize_int4
    monkeypatch.setattr(reference, "dequantize_int4", lambda p, *a: read.append(p.data_ptr()) or dequantize(p, *a))
    x = torch.randn(3, 64, requires_grad=True)
    y = int4_grouped_linear(x, packed, scale, offsets_of([0, 1, 0, 2], "cpu"))
    assert read == [packed[1].data_ptr(), packed[3].data_ptr()]
    y.sum().backward()
    assert read == 2 * [packed[1].data_ptr(), packed[3].data_ptr()]


def test_gradcheck_of_the_reference() -> None:
    packed, scale = weights(5, 32, 32, "cpu")
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: int4_linear(x, packed, scale), (x,))
    grouped = packed.expand(2, 5, 4), scale.expand(2, 5, 1), offsets_of([1, 0], "cpu")
    assert torch.autograd.gradcheck(lambda x: int4_grouped_linear(x, *grouped), (x,))


@pytest.mark.parametrize("rows", [0, 1, 9, reference.CPU_KERNEL_ROWS, reference.CPU_KERNEL_ROWS + 1])
@pytest.mark.parametrize("outputs", [32, 33])  # the CPU's layout wants a multiple of 16
def test_packed_for_the_cpu(rows, outputs) -> None:
    packed, scale = weights(outputs, 256, 64, "cpu")
    cpu_packed = pack_int4_for_cpu(packed, scale)
    x = torch.randn(2, rows, 256, dtype=torch.bfloat16)[0]
    compare(lambda x: int4_linear(x, packed, scale, cpu_packed), lambda x: exact_linear(x, packed, scale), x)
    x = x.float()  # torch's kernel is slow in fp32
    compare(lambda x: int4_linear(x, packed, scale, cpu_packed), lambda x: exact_linear(x, packed, scale), x)


def test_the_cpu_layout_is_used_for_few_bf16_rows(monkeypatch) -> None:
    packed, scale = weights(32, 64, 32, "cpu")
    cpu_packed = pack_int4_for_cpu(packed, scale)
    monkeypatch.setattr(reference, "dequantize_int4", None)  # whoever calls it fails
    rows = reference.CPU_KERNEL_ROWS
    int4_linear(torch.randn(rows, 64, dtype=torch.bfloat16), packed, scale, cpu_packed)
    for x in (torch.randn(rows + 1, 64, dtype=torch.bfloat16), torch.randn(1, 64)):
        with pytest.raises(TypeError):
            int4_linear(x, packed, scale, cpu_packed)


@given(
    seed=st.integers(0, 2**32),
    outputs=st.integers(1, 5),
    groups=st.integers(1, 3),
    group_size=st.sampled_from(GROUP_SIZES),
)
def test_packing_loses_nothing(seed, outputs, groups, group_size) -> None:
    """Integers with the largest magnitude in every group come back as they were, in their places."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-7, 8, (outputs, groups * group_size), generator=generator)
    values.unflatten(1, (groups, group_size))[..., seed % group_size] = -8  # what -7.5 rounds to
    weight = values.double().clamp(min=-7.5)
    packed, scale = quantize_int4(weight, group_size)
    assert packed.shape == (outputs, groups * group_size // 8) and packed.dtype == torch.int32
    assert torch.equal(scale, torch.ones(outputs, groups, dtype=torch.float64))
    assert torch.equal(dequantize_int4(packed, scale), values.double())


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), exponent=st.integers(-10, 10))
def test_quantization_error(seed, dtype, exponent) -> None:
    """At most half a step; the largest magnitude is 7.5 steps, of a scale that was rounded, and 7 is the end."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).mul(2.0**exponent).to(dtype)
    packed, scale = quantize_int4(weight, 32)
    steps = (weight.double() - dequantize_int4(packed, scale, torch.float64)).unflatten(1, (2, 32)) / scale[..., None]
    assert steps.abs().max() <= 0.5 + 7.5 * torch.finfo(dtype).eps
    assert scale.dtype == dtype


def test_order_of_the_values_in_a_word() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([-7.5, -7.0, 0.0, 1.0, 2.0, 3.0, 6.0, 7.5])
    packed, scale = quantize_int4(weight, 32)
    assert scale.item() == 1
    assert packed[0, 0].item() & 0xFFFFFFFF == 0xFEBA9810  # stored as value + 8, the first in the lowest bits
    assert packed[0, 1].item() & 0xFFFFFFFF == 0x88888888
    assert dequantize_int4(packed, scale)[0, :8].tolist() == [-8, -7, 0, 1, 2, 3, 6, 7]


def test_a_group_of_zeros() -> None:
    packed, scale = quantize_int4(torch.zeros(2, 64, dtype=torch.bfloat16), 64)
    assert (scale > 0).all() and not dequantize_int4(packed, scale).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_dequantizing_rounds_once(scale_dtype, dtype, device, triton_kernels) -> None:
    packed, scale = weights(66, 96, 32, device, scale_dtype)  # more than a block of words, the last not full
    packed, scale = packed.view(2, 33, -1), scale.view(2, 33, -1)  # as of two experts
    expected = exact_weight(packed, scale).to(dtype)
    assert torch.equal(dequantize_int4(packed, scale, dtype), expected)
    assert torch.equal(reference.dequantize_int4(packed, scale, dtype), expected)
    assert dequantize_int4(packed, scale).dtype == scale_dtype


def test_more_than_two_dimensions_strides_and_autocast(device, triton_kernels) -> None:
    packed, scale = weights(33, 128, 64, device)
    x = torch.randn(2, 3, 128, device=device).to(torch.bfloat16)
    compare(lambda x: int4_linear(x, packed, scale), lambda x: exact_linear(x, packed, scale), x)
    wide = torch.randn(5, 256, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        x = torch.randn(2, 128, device=device)
        y = int4_linear(x, packed, scale)
    assert y.dtype == torch.float32
    assert_close(y, exact_linear(x.double(), packed, scale), "in autocast")
    for x in (wide[:, :128], wide[:, ::2], wide.t()[:128, :3].t()):
        assert_close(int4_linear(x, packed, scale), exact_linear(x.double(), packed, scale), "strided")
        y = int4_grouped_linear(x, packed[None], scale[None], offsets_of([len(x)], device))
        assert_close(y, exact_linear(x.double(), packed, scale), "strided, grouped")


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    packed, scale = weights(16, 64, 64, device)
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    assert_close(int4_linear(x, packed, scale), exact_linear(x.double(), packed, scale), "far rows")
    y = int4_grouped_linear(x, packed[None], scale[None], offsets_of([3], device))
    assert_close(y, exact_linear(x.double(), packed, scale), "far rows, grouped")


def test_the_sum_over_splits_is_deterministic(device, triton_kernels) -> None:
    packed, scale = weights(33, 512, 32, device)
    x = torch.randn(2, 512, device=device).to(torch.bfloat16)
    assert torch.equal(int4_linear(x, packed, scale), int4_linear(x, packed, scale))


def test_a_tile_writes_its_own_rows(device, triton_kernels, monkeypatch) -> None:
    """The interpreter runs tiles in order, so the next one would hide what one writes past its end: here the last
    runs first."""
    from deepseek_v3.kernels.int4 import triton_impl

    tiles = triton_impl.expert_tiles
    monkeypatch.setattr(triton_impl, "expert_tiles", lambda *a: tiles(*a)._replace(table=tiles(*a).table.flip(1)))
    counts = [5, 0, 20, 3]
    packed, scale = weights(33, 64, 32, device, experts=(4,))
    x = torch.randn(28, 64, device=device)
    y = int4_grouped_linear(x, packed, scale, offsets_of(counts, device))
    assert_close(y, exact_grouped(x.double(), packed, scale, counts), "tiles in reverse")


def test_no_rows(device, triton_kernels) -> None:
    packed, scale = weights(33, 64, 64, device)
    assert int4_linear(torch.randn(0, 64, device=device), packed, scale).shape == (0, 33)
    assert int4_linear(torch.randn(2, 0, 64, device=device, dtype=torch.bfloat16), packed, scale).shape == (2, 0, 33)


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    packed, scale = weights(33, 64, 32, device)
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    assert_compiles(lambda x: int4_linear(x, packed, scale), x)
    ops = torch.ops.deepseek_v3
    torch.library.opcheck(ops.dequantize_int4.default, (packed, scale, torch.float32))
    grouped = torch.stack([packed, packed]), torch.stack([scale, scale]), offsets_of([1, 2], device)
    assert_compiles(lambda x: int4_grouped_linear(x, *grouped), x)
    torch.library.opcheck(ops.int4_grouped_linear_backward.default, (x[:, :33].contiguous(), *grouped))
    torch.library.opcheck(ops.int4_linear.default, (x.requires_grad_(), packed, scale))
    torch.library.opcheck(ops.int4_grouped_linear.default, (x, *grouped))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, s: quantize_int4(torch.zeros(2, 200)), "200 inputs, .* 128"),
        (lambda p, s: quantize_int4(torch.zeros(2, 64), 16), "group_size is 16"),
        (lambda p, s: quantize_int4(torch.zeros(2, 64, dtype=torch.int32), 64), "torch.int32"),
        (lambda p, s: dequantize_int4(p.long(), s), "packed is torch.int64"),
        (lambda p, s: dequantize_int4(p, s[:1]), r"scale \[1, 1\]"),
        (lambda p, s: dequantize_int4(p[:, :3], s), r"packed is \[2, 3\]"),
        (lambda p, s: int4_linear(torch.zeros(1, 32), p, s), r"x is \[1, 32\] and packed \[2, 8\]"),
        (lambda p, s: int4_linear(torch.zeros(1, 64), p[None], s[None]), r"packed \[1, 2, 8\]"),
        (lambda p, s: pack_int4_for_cpu(p[None, None], s[None, None]), r"packed is \[1, 1, 2, 8\]"),
        (lambda p, s: int4_grouped_linear(torch.zeros(1, 64), p, s, torch.zeros(2).int()), r"packed \[2, 8\]"),
        (lambda p, s: int4_grouped_linear(torch.zeros(1, 64), p[None], s[None], torch.zeros(2)), "offsets is torch.f"),
        (lambda p, s: int4_grouped_linear(torch.zeros(1, 64), p[None], s[None], torch.zeros(3).int()), r"int32 \[2\]"),
    ],
)
def test_wrong_input_is_named(call, message) -> None:
    packed, scale = weights(2, 64, 64, "cpu")
    with pytest.raises(ValueError, match=message):
        call(packed, scale)
