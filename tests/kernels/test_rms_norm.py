import pytest
import torch

from deepseek_v3.kernels.rms_norm import add_rms_norm, reference, rms_norm
from tests.kernels.checks import DTYPES, assert_close, assert_compiles, compare, run

EPS = 1e-6
SHAPES = [
    (1, 64),  # one token
    (7, 512),  # the latent's width; the last block of rows is not full
    (33, 97),  # odd width: masked columns
    (2, 5, 1536),  # more than two dimensions, a width that is no power of two
]


def exact_rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def exact_add_rms_norm(x, residual, weight, eps):
    return exact_rms_norm(x + residual, weight, eps), x + residual


def inputs(shape, dtype, device):
    x, residual = torch.randn(2, *shape, device=device).to(dtype).unbind()
    return x, residual, (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, device, triton_kernels) -> None:
    x, residual, weight = inputs(shape, dtype, device)
    compare(rms_norm, exact_rms_norm, x, weight, eps=EPS)
    compare(add_rms_norm, exact_add_rms_norm, x, residual, weight, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_fp64(dtype) -> None:
    x, residual, weight = inputs((33, 97), dtype, "cpu")
    compare(reference.rms_norm, exact_rms_norm, x, weight, eps=EPS)
    compare(reference.add_rms_norm, exact_add_rms_norm, x, residual, weight, eps=EPS)


def test_one_row_without_gradients_is_the_same(device) -> None:
    x, _, weight = inputs((1, 1, 512), torch.bfloat16, device)
    with torch.no_grad():
        assert torch.equal(
            reference.rms_norm(x, weight, EPS), reference.rms_norm(x.expand(2, 1, 512), weight, EPS)[:1]
        )


def test_rounds_where_the_reference_rounds(device, triton_kernels) -> None:
    x, _, weight = inputs((16, 512), torch.bfloat16, device)
    assert (rms_norm(x, weight, EPS) != reference.rms_norm(x, weight, EPS)).float().mean() < 0.01


def test_mixed_dtypes_promote_as_in_torch(device, triton_kernels) -> None:
    x, _, weight = inputs((5, 64), torch.bfloat16, device)
    compare(rms_norm, exact_rms_norm, x, weight.float(), eps=EPS, tolerance=6e-3)
    assert rms_norm(x, weight.float(), EPS).dtype == torch.float32


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_sum_of_mixed_dtypes_is_not_rounded_to_the_narrower(dtypes, device, triton_kernels) -> None:
    """Under autocast a projection's output is bf16 and the residual fp32."""
    x, residual, weight = inputs((5, 64), torch.float32, device)
    mixed = x.to(dtypes[0]), residual.to(dtypes[1]), weight
    found, grads = run(add_rms_norm, *mixed, eps=EPS)
    expected, expected_grads = run(reference.add_rms_norm, *mixed, eps=EPS)
    for a, b in zip(found + grads, expected + expected_grads, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert found[1].dtype == torch.float32 and torch.equal(found[1], mixed[0] + mixed[1])
    assert_compiles(add_rms_norm, *mixed, eps=EPS)


def test_a_slice_of_wider_rows(device, triton_kernels) -> None:
    wide = torch.randn(2, 9, 97 + 31, device=device)
    weight = torch.randn(97, device=device)
    assert_close(rms_norm(wide[..., :97], weight, EPS), exact_rms_norm(wide[..., :97].double(), weight, EPS), "slice")


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    # three rows 2^30 apart: a stride of 2^31 itself would be passed in 64 bits and hide a 32-bit product
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    assert_close(rms_norm(x, weight, EPS), exact_rms_norm(x.double(), weight.double(), EPS), "far rows")


def test_no_rows(device, triton_kernels) -> None:
    outputs, grads = run(rms_norm, torch.randn(0, 64, device=device), torch.ones(64, device=device), eps=EPS)
    assert outputs[0].shape == (0, 64) and grads[1].eq(0).all()


def test_an_unused_output(device, triton_kernels) -> None:
    x, residual, weight = inputs((3, 64), torch.float32, device)
    compare(lambda *a: add_rms_norm(*a, EPS)[0], lambda *a: exact_add_rms_norm(*a, EPS)[0], x, residual, weight)
    total = add_rms_norm(x.requires_grad_(), residual, weight, EPS)[1]
    total.sum().backward()
    assert x.grad.eq(1).all()


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    x, residual, weight = inputs((6, 64), torch.float32, device)
    assert_compiles(add_rms_norm, x, residual, weight, eps=EPS)
    arguments = (x.requires_grad_(), residual, weight.requires_grad_(), EPS)
    torch.library.opcheck(torch.ops.deepseek_v3.rms_norm.default, arguments)
