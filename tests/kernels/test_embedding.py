"""The gradient of the token table against an fp32 sum, and against torch's embedding where that one is exact."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.kernels.embedding import embedding


def table(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(vocab, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def test_many_occurrences_of_a_token_are_summed_in_fp32() -> None:
    """torch's own sum stops growing where an addend is below half a unit in the last place of the sum."""
    generator = torch.Generator().manual_seed(1)
    ids = (512 * torch.rand(8, 4096, generator=generator) ** 4).long()  # some are common, as in a text
    grad = (torch.randn(8, 4096, 16, generator=generator) + 0.5).bfloat16()
    expected = torch.zeros(512, 16).index_add_(0, ids.flatten(), grad.flatten(0, 1).float())
    errors = []
    for function in (embedding, F.embedding):
        weight = table(512, torch.bfloat16)
        function(ids, weight).backward(grad)
        errors.append(float((weight.grad.float() - expected).norm() / expected.norm()))
    assert errors[0] < 0.004 and errors[1] > 0.1, errors


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_torch_s(dtype: torch.dtype, padding: int | None) -> None:
    ids = torch.tensor([[3, 1, 7], [2, 3, 6]])  # no token so often that rounding differs
    grad = torch.ones(2, 3, 16, dtype=dtype)
    results = []
    for function in (embedding, F.embedding):
        weight = table(8, dtype)
        output = function(ids, weight, padding)
        output.backward(grad)
        results.append((output.detach(), weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_frozen_table_and_one_without_rows_looked_up() -> None:
    assert not embedding(torch.tensor([1]), table(4, torch.bfloat16).detach()).requires_grad
    weight = table(4, torch.bfloat16)
    embedding(torch.zeros(2, 0, dtype=torch.int64), weight).sum().backward()
    assert not weight.grad.any()
