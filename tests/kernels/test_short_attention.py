"""Short sequences' attention on a CPU against the definition in fp64, beside torch's own."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.kernels.short_attention import MAX_LENGTH, short_attention, takes
from tests.modeling_deepseek_v3.helpers import build

B, H, D, V = 2, 3, 24, 16
SCALE = 0.3
Tensors = tuple[torch.Tensor, ...]


def inputs(length: int, dtype: torch.dtype) -> Tensors:
    """query, key, value, and the output's gradient. Heads stand behind the positions, as the model's do."""
    generator = torch.Generator().manual_seed(length)
    made = (torch.randn(B, length, H, d, generator=generator).to(dtype) for d in (D, D, V, V))
    return tuple(x.transpose(1, 2) for x in made)


def masks(length: int) -> dict[str, torch.Tensor | None]:
    """Causal, with the first sequence's last three columns hidden, and two packed documents."""
    causal = torch.ones(length, length, dtype=torch.bool).tril_().expand(B, 1, length, length).clone()
    right = causal.clone()
    right[0, :, :, length - 3 :] = False
    documents = causal.clone()
    documents[:, :, length // 2 :, : length // 2] = False
    return {"none": None, "right": right, "documents": documents}


def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_() if mask is None else mask
    scores = (torch.matmul(query, key.transpose(-1, -2)) * SCALE).masked_fill(~visible, float("-inf"))
    return torch.matmul(scores.softmax(-1), value)


def torch_s(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    value = F.pad(value, (0, D - V))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=SCALE, is_causal=mask is None)[..., :V]


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    assert takes(query, key, value, mask)
    return short_attention(query, key, value, SCALE, mask)


def run(function, tensors: Tensors, mask: torch.Tensor | None) -> list[torch.Tensor]:
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = function(*leaves, mask)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("mask", ["none", "right", "documents"])
@pytest.mark.parametrize("length", [4, 33, MAX_LENGTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_as_near_to_fp64_as_torch_s(dtype: torch.dtype, length: int, mask: str) -> None:
    tensors, visible = inputs(length, dtype), masks(length)[mask]
    expected = run(definition, tuple(x.double() for x in tensors), visible)
    found, peer = (
        [float((x - y).norm() / y.norm()) for x, y in zip(run(function, tensors, visible), expected, strict=True)]
        for function in (ours, torch_s)
    )
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert max(found) < limit and max(found) < 1.2 * max(peer), (found, peer)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    tensors = inputs(8, torch.float32)
    mask = torch.ones(8, 8, dtype=torch.bool).tril_().expand(B, 1, 8, 8).clone()
    mask[0, :, :, :3] = False  # as padding on the left: the first three rows of the first sequence see nothing
    _, *gradients = run(ours, tensors, mask)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert not gradients[0][0, :, :3].any() and not gradients[1][0, :, :3].any() and not gradients[2][0, :, :3].any()


def test_what_it_leaves_to_torch() -> None:
    query, key, value, _ = (x.requires_grad_() for x in inputs(8, torch.float32))
    mask = torch.ones(B, 1, 8, 8, dtype=torch.bool)
    assert takes(query, key, value, None) and takes(query, key, value, mask)
    assert not takes(query[:, :, :1], key, value, None)  # causal would be from the first key on
    assert not takes(query, key, value, mask.float())
    assert not takes(query, key, value, mask[..., :1])
    assert not takes(query, key.bfloat16(), value, None)
    assert not takes(query.detach(), key.detach(), value.detach(), None)
    assert not takes(*(x.repeat(1, 1, 32, 1) for x in (query, key, value)), None)
    with torch.no_grad():
        assert not takes(query, key, value, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(query, key, value, None)


def test_a_model_without_causality_keeps_none_in_training() -> None:
    """As encoders made of decoders set it; transformers' SDPA heeds the attribute."""
    model = build(attn_implementation="sdpa")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        causal = model(ids, use_cache=False).logits
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        expected = model(ids, use_cache=False).logits
    assert (expected - causal).abs().max() > 0.1
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
