import math
from contextlib import ExitStack, contextmanager

import pytest
import torch

from deepseek_v3.kernels.configs import forced_config
from deepseek_v3.kernels.mla_attention import mla_attention, reference
from tests.kernels.checks import DTYPES, assert_close, assert_compiles, compare, run

SCALE = 0.2
KERNELS = ("mla_attention_forward", "mla_attention_backward_query", "mla_attention_backward_key_value")
TILES = [  # queries and keys of a block, and whether the tensor memory accelerator reads them
    (32, 64, False),
    (64, 32, True),
]
SHAPES = [  # batch, queries, keys, heads, nope, rope, value
    (1, 1, 1, 1, 16, 16, 16),  # one token
    (2, 35, 35, 3, 32, 16, 16),  # less than a block, or two of which one is not full; 3 heads
    (1, 131, 131, 1, 16, 32, 16),  # several blocks, tails of both kinds
    (1, 64, 64, 1, 16, 16, 32),  # full blocks only
    (1, 5, 150, 1, 16, 16, 16),  # a chunk after a cache: the first query stands inside a block of keys
    (1, 70, 132, 1, 16, 16, 16),  # the same with several blocks; the first query sees all but one key of its block
]
DOCUMENTS = {  # their lengths
    "one": [129],
    "edges": [64, 32, 33],  # boundaries at the edges of blocks
    "inside": [5, 1, 1, 70, 52],  # boundaries inside of blocks, documents of one token
    "pairs": [2] * 64 + [1],
}


def exact_attention(query, key_nope, key_rope, value, *, scale, document_starts=None):
    """One query at a time, over the keys that it sees."""
    length, total, nope = query.shape[1], key_nope.shape[1], key_nope.shape[-1]
    position = torch.arange(total, device=query.device)
    outputs = []
    for row in range(length):
        scores = torch.einsum("bhn,bthn->bht", query[:, row, :, :nope], key_nope)
        scores = (scores + torch.einsum("bhr,btr->bht", query[:, row, :, nope:], key_rope)) * scale
        seen = position <= row + total - length
        if document_starts is not None:
            seen = seen & (position >= document_starts[:, row, None, None])
        weights = torch.where(seen, scores.exp(), 0)  # in fp64 that needs no shift
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        outputs.append(torch.einsum("bht,bthv->bhv", weights, value))
    return torch.stack(outputs, dim=1)


@contextmanager
def tiles(queries, keys, tma):
    """All three kernels with these blocks."""
    entry = {"BLOCK_M": queries, "BLOCK_N": keys, "TMA": tma, "num_warps": 4, "num_stages": 2}
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(forced_config(kernel, entry))
        yield


def inputs(shape, dtype, device):
    batch, length, total, heads, nope, rope, columns = shape
    query = torch.randn(batch, length, heads, nope + rope, device=device)
    key_nope = torch.randn(batch, total, heads, nope, device=device)
    key_rope = torch.randn(batch, total, rope, device=device)
    value = torch.randn(batch, total, heads, columns, device=device)
    return tuple(x.to(dtype) for x in (query, key_nope, key_rope, value))


def packed(lengths):
    """The starts `[S]` of documents of these lengths, one after the other."""
    lengths = torch.tensor(lengths)
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths).int()


def padded(padding, length):
    """The starts `[S]` of a row whose first `padding` tokens are none."""
    return torch.full((length,), padding, dtype=torch.int32)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, tile, device, triton_kernels) -> None:
    with tiles(*tile):
        compare(mla_attention, exact_attention, *inputs(shape, torch.float32, device), scale=SCALE)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_against_fp64(dtype, device, triton_kernels) -> None:
    with tiles(*TILES[1]):
        compare(mla_attention, exact_attention, *inputs((1, 67, 67, 2, 32, 16, 16), dtype, device), scale=SCALE)


def test_the_widths_of_v3(device, triton_kernels) -> None:
    x = inputs((1, 140, 140, 1, 128, 64, 128), torch.bfloat16, device)
    compare(mla_attention, exact_attention, *x, scale=192**-0.5)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents(lengths, tile, device, triton_kernels) -> None:
    x, starts = inputs((1, 129, 129, 1, 16, 16, 16), torch.float32, device), packed(lengths)[None].to(device)
    with tiles(*tile):
        compare(mla_attention, exact_attention, *x, scale=SCALE, document_starts=starts)


@pytest.mark.parametrize("tile", TILES)
def test_rows_of_a_batch_differ(tile, device, triton_kernels) -> None:
    x = inputs((3, 50, 50, 2, 16, 16, 16), torch.float32, device)
    starts = torch.stack((packed([20, 30]), padded(40, 50), padded(0, 50))).to(device)
    with tiles(*tile):
        compare(mla_attention, exact_attention, *x, scale=SCALE, document_starts=starts)


@pytest.mark.parametrize("tile", TILES)
def test_documents_after_a_cache(tile, device, triton_kernels) -> None:
    """Key 129 is the first of a document and of a block of queries, and the second of a block of keys."""
    x = inputs((1, 170, 235, 1, 16, 16, 16), torch.float32, device)
    starts = packed([80, 49, 106])[None, -170:].to(device)
    with tiles(*tile):
        compare(mla_attention, exact_attention, *x, scale=SCALE, document_starts=starts)


@pytest.mark.parametrize("tile", TILES)
def test_starts_in_any_order(tile, device, triton_kernels) -> None:
    x = inputs((1, 100, 131, 1, 16, 16, 16), torch.float32, device)
    starts = torch.randint(-5, 140, (1, 100), device=device, dtype=torch.int32)
    with tiles(*tile):
        compare(mla_attention, exact_attention, *x, scale=SCALE, document_starts=starts)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("padding", [7, 64, 80, 1000])  # inside a block, at an edge, the whole row, past the keys
def test_rows_that_see_nothing_are_zero(padding, tile, device, triton_kernels) -> None:
    x = inputs((1, 80, 80, 1, 16, 16, 16), torch.float32, device)
    with tiles(*tile):
        (output,), grads = run(mla_attention, *x, scale=SCALE, document_starts=padded(padding, 80)[None].to(device))
    seen = max(0, 80 - padding)
    for name, found in zip(("output", "query", "key_nope", "key_rope", "value"), (output, *grads), strict=True):
        assert found[:, : 80 - seen].eq(0).all(), name
        assert found[:, 80 - seen :].ne(0).any() == (seen > 0), name
        assert found.isfinite().all(), name


@pytest.mark.parametrize("tile", TILES)
def test_blocks_that_no_query_sees_are_not_read(tile, device, triton_kernels) -> None:
    query, *keys = inputs((1, 120, 120, 1, 16, 16, 16), torch.float32, device)
    starts = torch.full((1, 120), 64, dtype=torch.int32, device=device)
    later_value = keys[2].clone()
    later_value[:, 64:] = torch.nan
    with tiles(*tile):
        assert mla_attention(query, *keys[:2], later_value, SCALE)[:, :64].isfinite().all()
        for x in keys:
            x[:, :64] = torch.nan
        (output,), grads = run(mla_attention, query, *keys, scale=SCALE, document_starts=starts)
    assert all(x.isfinite().all() for x in (output, *grads))


def test_logsumexp(device, triton_kernels) -> None:
    query, key_nope, key_rope, value = inputs((1, 40, 40, 1, 16, 16, 16), torch.float32, device)
    starts = padded(3, 40)[None].to(device)
    found = torch.ops.deepseek_v3.mla_attention(query, key_nope, key_rope, value, SCALE, starts)[1]
    keys = torch.cat((key_nope[:, :, 0], key_rope), dim=-1)
    scores = (SCALE * query[0, :, 0] @ keys[0].T).where(torch.ones(40, 40, device=device).tril() > 0, -torch.inf)
    assert found[..., :3].eq(torch.inf).all()  # those queries see nothing
    assert_close(found[0, 0, 3:], scores[3:, 3:].double().logsumexp(-1) / math.log(2), "logsumexp")


@pytest.mark.parametrize("tile", TILES)
def test_large_scores(tile, device, triton_kernels) -> None:
    with tiles(*tile):
        x = inputs((1, 70, 70, 1, 16, 16, 16), torch.float32, device)
        compare(mla_attention, exact_attention, *x, scale=10.0, tolerance=1e-4)  # scores to 250: eps is 3e-5 there
        output = mla_attention(*(100 * y for y in x), SCALE)
    assert output.isfinite().all()


@pytest.mark.parametrize("tile", TILES)
def test_strided_inputs(tile, device, triton_kernels) -> None:
    query, key_nope, key_rope, value = inputs((2, 40, 40, 2, 16, 16, 32), torch.float32, device)
    expanded = torch.cat((key_nope, value), dim=-1)
    strided = (
        query.transpose(1, 2).contiguous().transpose(1, 2),  # heads outside of positions
        expanded[..., :16],
        torch.cat((value[:, :, 0], key_rope), dim=-1)[..., 32:],
        expanded[..., 16:],
    )
    unaligned = tuple(torch.cat((x[..., :1], x), dim=-1)[..., 1:] for x in strided)  # no address divides by 16 bytes
    shifted = tuple(torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in strided)
    columns_apart = tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in strided)
    with tiles(*tile):
        expected = run(mla_attention, query, key_nope, key_rope, value, scale=SCALE)
        for views in (strided, unaligned, shifted, columns_apart):
            output = mla_attention(*(x.requires_grad_() for x in views), SCALE)
            assert torch.equal(output, expected[0][0])
    grads = torch.autograd.grad(output, views, torch.ones_like(output))
    assert [x.shape for x in grads] == [x.shape for x in views]


@pytest.mark.parametrize("tile", TILES)
def test_addresses_past_32_bits(tile, device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # address space only
    near = inputs((1, 2, 2, 2, 16, 16, 16), torch.bfloat16, device)
    key = torch.empty(2**32, dtype=torch.bfloat16, device=device)
    far = [
        key.as_strided((1, 2, 2, 32), (0, 2**31 + 64, 64, 1)),
        key[128:].as_strided((1, 2, 2, 16), (0, 64, 2**31 + 64, 1)),
        key[32:].as_strided((1, 2, 16), (0, 2**31 + 64, 1)),
        key[256:].as_strided((1, 2, 2, 16), (0, 64, 2**31 + 64, 1)),
    ]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    with tiles(*tile):
        expected, output = mla_attention(*near, SCALE), mla_attention(*far, SCALE)
        assert torch.equal(output, expected)
        arguments = (expected, torch.zeros(1, 2, 2, device=device), SCALE, None)
        expected = torch.ops.deepseek_v3.mla_attention_backward(output, *near, *arguments)
        found = torch.ops.deepseek_v3.mla_attention_backward(output, *far, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_no_queries(device, triton_kernels) -> None:
    x = inputs((2, 0, 9, 1, 16, 16, 16), torch.float32, device)
    (output,), grads = run(mla_attention, *x, scale=SCALE)
    assert output.shape == (2, 0, 1, 16) and all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_fp64(dtype) -> None:
    x = inputs((3, 20, 30, 3, 16, 16, 8), dtype, "cpu")
    starts = torch.stack((packed([15, 1, 14])[10:], padded(18, 20), padded(0, 20)))
    compare(reference.mla_attention, exact_attention, *x, scale=SCALE)
    compare(reference.mla_attention, exact_attention, *x, scale=SCALE, document_starts=starts)


def test_reference_gradients() -> None:
    x = tuple(y.requires_grad_() for y in inputs((1, 4, 6, 2, 3, 2, 2), torch.float64, "cpu"))
    starts = torch.tensor([[0, 5, 2, 3]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *y: reference.mla_attention(*y, SCALE, starts), x)


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    x = inputs((1, 6, 8, 1, 16, 16, 16), torch.float32, device)
    starts = torch.tensor([[0, 0, 0, 4, 4, 4]], dtype=torch.int32, device=device)
    assert_compiles(mla_attention, *x, scale=SCALE, document_starts=starts)
    arguments = (*(y.requires_grad_() for y in x), SCALE, starts)
    torch.library.opcheck(torch.ops.deepseek_v3.mla_attention.default, arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key_nope", lambda x: x[..., :12], "query has shape"),
        ("key_nope", lambda x: x[0], "key_nope has shape"),
        ("key_rope", lambda x: x.unsqueeze(2), "key_rope has shape"),
        ("key_rope", lambda x: x[:, 1:], "key_rope has shape"),
        ("key_rope", lambda x: x.half(), "key_rope is torch.float16"),
        ("value", lambda x: x[:, :, 1:], "value has shape"),
        ("value", lambda x: x[..., :12], "value has 12 columns"),
        ("value", lambda x: x[..., :8], "value has 8 columns"),
        ("query", lambda x: torch.cat((x, x), dim=1), "key_nope has 5 positions"),
        ("scale", lambda x: 0.0, "scale is 0.0"),
        ("document_starts", lambda x: x[:, 1:], "document_starts has shape"),
        ("document_starts", lambda x: x.long(), "document_starts is torch.int64"),
    ],
)
def test_errors(name, change, message, triton_kernels) -> None:
    names = ("query", "key_nope", "key_rope", "value")
    arguments = dict(zip(names, inputs((1, 5, 5, 2, 16, 16, 16), torch.float32, "cpu"), strict=True))
    arguments |= {"scale": SCALE, "document_starts": torch.zeros(1, 5, dtype=torch.int32)}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        mla_attention(**arguments)


def test_gradients_do_not_depend_on_the_tile(device, triton_kernels) -> None:
    x = inputs((1, 70, 70, 2, 16, 16, 16), torch.float32, device)
    found = []
    for tile in TILES:
        with tiles(*tile):
            found.append(run(mla_attention, *x, scale=SCALE)[1])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, "gradient")
