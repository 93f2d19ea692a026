import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

from deepseek_v3.kernels.rope import reference, rotate_queries_and_key_
from tests.kernels.checks import DTYPES, assert_close, assert_compiles, compare, run

SHAPES = [  # batch, length, heads, nope, rope
    (1, 1, 1, 16, 8),  # one token, one head
    (
        2,
        3,
        5,
        24,
        10,
    ),  # masked heads and columns: 5 heads in a block of 8, 5 pairs in one of 8, 24 columns in one of 32
    (1, 7, 40, 8, 4),  # several head blocks, the last one not full
    (3, 11, 2, 4, 64),  # several token blocks, the last one not full; a block spans sequences
    (1, 4, 3, 0, 6),  # nothing but rope columns
]


def inputs(shape, dtype, device="cpu", positions=None):
    """Queries, key, cos and sin of `positions` sequences (one by default); the key is the end of a wider row."""
    batch, length, heads, nope, rope = shape
    queries = torch.randn(batch, length, heads, nope + rope).to(device, dtype)
    key = torch.randn(batch, length, 9 + rope).to(device, dtype)[..., 9:]
    angles = 6 * torch.rand(positions or 1, length, rope // 2)
    return queries, key, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def exact(queries, key, cos, sin, interleave=True):
    """As a complex product."""
    rope = key.shape[-1]
    angles = torch.complex(cos, sin)

    def rotate(x, angles):
        pairs = x.unflatten(-1, (rope // 2, 2) if interleave else (2, rope // 2))
        pairs = pairs if interleave else pairs.transpose(-1, -2)
        rotated = torch.view_as_complex(pairs.contiguous()) * angles
        return torch.cat((rotated.real, rotated.imag), dim=-1)

    rotated = rotate(queries[..., -rope:], angles.unsqueeze(2))
    return torch.cat((queries[..., :-rope], rotated), dim=-1), rotate(key, angles)


def op(queries, key, cos, sin, interleave=True):
    """On what a projection would return: no leaf."""
    return rotate_queries_and_key_(queries * 1, key, cos, sin, interleave)


def compare_all(function, queries, key, cos, sin, interleave):
    cos64, sin64 = cos.double(), sin.double()
    compare(
        lambda q, k: function(q, k, *((cos, sin) if q.dtype == cos.dtype else (cos64, sin64)), interleave),
        lambda q, k: exact(q, k, cos64, sin64, interleave),
        queries,
        key,
    )


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, interleave, device, triton_kernels) -> None:
    compare_all(op, *inputs(shape, dtype, device, positions=shape[0]), interleave)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_fp64(dtype, interleave) -> None:
    compare_all(reference.rotate_queries_and_key, *inputs(SHAPES[1], dtype), interleave)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_stock_transformers(dtype, interleave) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], dtype, positions=2)
    rotate = stock.apply_rotary_pos_emb_interleave if interleave else stock.apply_rotary_pos_emb
    angles = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    expected, expected_key = rotate(queries[..., 24:], key.unsqueeze(2), *angles, unsqueeze_dim=2)
    rotated, rotated_key = reference.rotate_queries_and_key(queries, key, cos, sin, interleave)
    assert torch.equal(rotated, torch.cat((queries[..., :24], expected), dim=-1))
    assert torch.equal(rotated_key, expected_key.squeeze(2))


def test_reference_gradcheck() -> None:
    queries, key, cos, sin = inputs((2, 3, 2, 4, 6), torch.float64)
    leaves = queries.requires_grad_(), key.requires_grad_()
    torch.autograd.gradcheck(lambda q, k: reference.rotate_queries_and_key(q, k, cos, sin, True), leaves)


def test_rounds_once(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs((1, 8, 4, 0, 32), torch.bfloat16, device)
    expected, expected_key = exact(queries.double(), key.double(), cos.double(), sin.double())
    rotated, rotated_key = rotate_queries_and_key_(queries, key, cos, sin)
    assert (rotated != expected.bfloat16()).float().mean() < 0.001
    assert (rotated_key != expected_key.bfloat16()).float().mean() < 0.001


@pytest.mark.parametrize("grad", [True, False])
def test_in_place(grad, device, triton_kernels) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    expected, before = exact(queries, key, cos, sin), key.clone()
    flat = queries.flatten(2) * torch.ones((), device=device, requires_grad=grad)
    view = flat.view(queries.shape)
    rotated, rotated_key = rotate_queries_and_key_(view, key, cos, sin)
    assert rotated.data_ptr() == flat.data_ptr() and flat._version == rotated._version > 0
    assert not grad or rotated.grad_fn.name() == "ViewBackward0"  # and no node that copies the gradient
    assert_close(flat, expected[0].flatten(2), "the projection's output")
    assert rotated_key.is_contiguous() and torch.equal(key, before)


def test_in_place_on_any_strides(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs((2, 3, 4, 6, 8), torch.float32, device)
    expected = exact(queries, key, cos, sin)[0]
    wide = torch.randn(2, 4, 3, 20, device=device)  # heads before positions, columns beside
    before = wide.clone()
    view = wide.transpose(1, 2)[..., 3:17]
    view.copy_(queries)
    assert_close(rotate_queries_and_key_(view, key, cos, sin)[0], expected, "queries")
    assert_close(view, expected, "in place")
    assert torch.equal(wide[..., :3], before[..., :3]) and torch.equal(wide[..., 17:], before[..., 17:])


def test_gradient_of_a_view_and_of_what_it_views(device, triton_kernels) -> None:
    """The model's case; the projection's output itself, and a view taken before, have the same history."""
    queries, key, cos, sin = inputs((2, 3, 4, 8, 6), torch.float32, device)
    hidden, weight = torch.randn(2, 3, 7, device=device), torch.randn(4 * 14, 7, device=device)

    def through(rotate, result):
        hidden_, weight_, key_ = (x.clone().requires_grad_() for x in (hidden, weight, key))
        flat = F.linear(hidden_, weight_)
        view = flat.view(2, 3, 4, 14)
        rotated, rotated_key = rotate(view, key_, cos, sin)
        used = {"returned": rotated, "view": view, "flat": flat.view(2, 3, 4, 14)}[result]
        (used.sin().sum() + rotated_key.cos().sum()).backward()
        return hidden_.grad, weight_.grad, key_.grad

    expected = through(exact, "returned")
    for result in ("returned", "view", "flat"):
        for found, grad in zip(through(rotate_queries_and_key_, result), expected, strict=True):
            assert_close(found, grad, result)


def test_backward_leaves_the_incoming_gradient_alone(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    queries.requires_grad_()
    other = torch.randn_like(queries, requires_grad=True)
    y = rotate_queries_and_key_(queries * 1, key, cos, sin)[0] + other  # both get the same tensor
    grad = torch.randn_like(y)
    before = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, before) and torch.equal(other.grad, before)
    expected = torch.autograd.grad(exact(queries, key, cos, sin)[0], queries, before)[0]
    assert_close(queries.grad, expected, "gradient")


def test_a_gradient_that_is_one_number(device, triton_kernels) -> None:
    """A sum's gradient has strides of zero."""
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    queries, key = queries.requires_grad_(), key.requires_grad_()

    def gradients(rotate):
        rotated, rotated_key = rotate(queries * 1, key, cos, sin)
        return torch.autograd.grad(rotated.sum() + rotated_key.sum(), (queries, key))

    for found, expected in zip(gradients(rotate_queries_and_key_), gradients(exact), strict=True):
        assert_close(found, expected, "gradient")


def test_gradient_of_a_part_of_a_wider_tensor(device, triton_kernels) -> None:
    """Not in place, but right."""
    queries, key, cos, sin = inputs((2, 3, 4, 6, 8), torch.float32, device)
    wide = torch.randn(2, 3, 4 * 14 + 5, device=device, requires_grad=True)

    def part(function):
        return lambda x: function((x * 1)[..., 5:].unflatten(-1, (4, 14)), key, cos, sin)[0]

    compare(part(rotate_queries_and_key_), part(lambda q, k, c, s: exact(q, k, c.to(q), s.to(q))), wide)


@pytest.mark.parametrize("trained", ["queries", "key"])
def test_only_one_needs_a_gradient(trained, device, triton_kernels) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    if trained == "queries":
        compare(lambda q: op(q, key, cos, sin)[0], lambda q: exact(q, key, cos, sin)[0], queries)
    else:
        compare(lambda k: op(queries, k, cos, sin)[1], lambda k: exact(queries, k, cos.to(k), sin.to(k))[1], key)


def test_a_leaf_is_refused_before_it_is_changed(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    leaf = queries.clone().requires_grad_()
    for x in (leaf, leaf.view(queries.shape)):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            rotate_queries_and_key_(x, key, cos, sin)
    assert torch.equal(leaf, queries)
    with torch.no_grad():
        assert rotate_queries_and_key_(leaf, key, cos, sin)[0] is leaf


def test_what_backward_keeps_is_protected(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    produced = queries.requires_grad_().exp()  # exp keeps its output
    rotated, _ = rotate_queries_and_key_(produced, key, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


def test_the_key_may_come_from_split(device, triton_kernels) -> None:
    """And the row beside it may have been kept for backward already."""
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    row = torch.randn(2, 3, 19, device=device, requires_grad=True)

    def both(rotate):
        latent, key_ = (row * 1).split([9, 10], dim=-1)
        normed = latent.square()
        return torch.autograd.grad((rotate(queries.clone(), key_, cos, sin)[1] * 2).sum() + normed.sum(), row)[0]

    assert_close(both(rotate_queries_and_key_), both(exact), "gradient")


def test_inference_mode(device, triton_kernels) -> None:
    with torch.inference_mode():
        queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
        expected = exact(queries, key, cos, sin)
        rotated, rotated_key = rotate_queries_and_key_(queries, key, cos, sin)
        assert rotated is queries
    assert_close(rotated, expected[0], "queries")
    assert_close(rotated_key, expected[1], "key")


def test_angles_in_fp32(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs(SHAPES[1], torch.float32, device)
    queries, key = queries.bfloat16(), key.bfloat16()
    expected = exact(queries.double(), key.double(), cos.double(), sin.double())
    for rotate in (reference.rotate_queries_and_key, rotate_queries_and_key_):
        rotated, rotated_key = rotate(queries, key, cos, sin, True)
        assert rotated.dtype == rotated_key.dtype == torch.bfloat16
        assert_close(rotated, expected[0], "queries")
        assert_close(rotated_key, expected[1], "key")


@pytest.mark.parametrize("outer", [(3, 1, 1), (1, 3, 1), (1, 1, 3)])
def test_addresses_past_32_bits(outer, device, triton_kernels, monkeypatch) -> None:
    """Strides that fit in 32 bits, of which twice is past them: of the sequences, the positions, the heads."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = [2**30 if size > 1 else 16 for size in outer]
    queries = memory.as_strided((*outer, 16), (*far, 1))
    key = memory.as_strided((*outer[:2], 8), (*far[:2], 1), 40)
    near, near_key, cos, sin = inputs((*outer, 8, 8), torch.bfloat16, device)
    queries.copy_(near)
    key.copy_(near_key)
    expected, expected_key = exact(near.double(), near_key.double(), cos.double(), sin.double())
    rotated, rotated_key = rotate_queries_and_key_(queries, key, cos, sin)
    assert_close(rotated, expected, "queries")
    assert_close(rotated_key, expected_key, "key")


def test_no_tokens(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs((1, 0, 2, 4, 4), torch.float32, device)
    outputs, grads = run(op, queries, key, cos=cos, sin=sin)
    assert outputs[0].shape == grads[0].shape == (1, 0, 2, 8) and outputs[1].shape == (1, 0, 4)


@pytest.mark.parametrize("interleave", [True, False])
def test_torch_compile_and_opcheck(interleave, device, triton_kernels) -> None:
    queries, key, cos, sin = inputs((2, 3, 2, 8, 8), torch.float32, device)
    fixed = {"cos": cos, "sin": sin, "interleave": interleave}
    assert_compiles(op, queries, key, **fixed)
    torch.library.opcheck(torch.ops.deepseek_v3.rope_in_place.default, (queries, key, cos, sin, interleave))
    arguments = (queries.requires_grad_(), key.requires_grad_(), cos, sin, interleave, False)
    torch.library.opcheck(torch.ops.deepseek_v3.rope.default, arguments)


def test_torch_compile_without_gradients_is_in_place(device, triton_kernels) -> None:
    queries, key, cos, sin = inputs((2, 3, 2, 8, 8), torch.float32, device)
    expected = exact(queries, key, cos, sin)
    torch._dynamo.reset()
    compiled = torch.compile(rotate_queries_and_key_, backend="aot_eager", fullgraph=True)
    rotated, rotated_key = compiled(queries, key, cos, sin)
    assert_close(queries, expected[0], "the input")
    assert_close(rotated, expected[0], "queries")
    assert_close(rotated_key, expected[1], "key")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("queries", lambda q, k, c, s: (q[0], k, c, s)),
        ("queries", lambda q, k, c, s: (q.transpose(2, 3), k, c, s)),
        ("key", lambda q, k, c, s: (q, k[:1], c, s)),
        ("key", lambda q, k, c, s: (q, k[..., :7], c, s)),  # odd
        ("key", lambda q, k, c, s: (q, torch.cat((k, k, k), -1), c, s)),  # wider than a query head
        ("cos", lambda q, k, c, s: (q, k, c[:, :2], s)),
        ("sin", lambda q, k, c, s: (q, k, c, s[..., :3])),
    ],
)
def test_arguments_that_do_not_fit(name, change) -> None:
    with pytest.raises(ValueError, match=f"^{name}: found .*allowed"):
        rotate_queries_and_key_(*change(*inputs((2, 3, 4, 8, 8), torch.float32)))
