from contextlib import contextmanager

import pytest
import torch

from deepseek_v3.kernels.configs import forced_config
from deepseek_v3.kernels.mla_decode import mla_decode, reference, triton_impl
from tests.kernels.checks import DTYPES, assert_close, compare

# An additive mask's lowest number times log2(e), which the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
SCALE = 0.2
TILES = [  # rows and keys of a block, and whether the tensor memory accelerator reads the keys
    (16, 32, False),
    (32, 16, True),
]
SHAPES = [  # batch, queries, keys, heads, latent, rope
    (1, 1, 1, 1, 16, 16),  # one head, one key
    (2, 1, 70, 3, 64, 16),  # rows and keys both leave a block unfilled
    (1, 1, 64, 32, 16, 32),  # full blocks only
    (1, 3, 45, 16, 32, 16),  # a draft of three tokens; a block of 16 rows holds one query, one of 32 two
    (2, 5, 33, 7, 16, 16),  # the heads of a query begin inside a block of rows
]


def exact_decode(query_latent, query_rope, latent, key_rope, mask=None, *, scale):
    """One head of one query at a time, `mask [B, S, T]` as for the op."""
    outputs = torch.zeros_like(query_latent)
    for b, s, h in torch.cartesian_prod(*map(torch.arange, query_latent.shape[:3])).view(-1, 3).tolist():
        scores = (latent[b] @ query_latent[b, s, h] + key_rope[b] @ query_rope[b, s, h]) * scale
        if mask is not None:
            row = mask[b % len(mask), 0, s, : len(scores)]
            seen = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min
            if not seen.any():
                continue
            scores = (scores if row.dtype == torch.bool else scores + row).masked_fill(~seen, -torch.inf)
        outputs[b, s, h] = scores.softmax(0) @ latent[b]
    return outputs


@contextmanager
def tiles(rows, keys, tma):
    entry = {"BLOCK_M": rows, "BLOCK_N": keys, "TMA": tma, "num_warps": 4, "num_stages": 2}
    with forced_config("mla_decode", entry):
        yield


def inputs(shape, dtype, device):
    batch, length, total, heads, columns, rope = shape
    query_latent = torch.randn(batch, length, heads, columns, device=device)
    query_rope = torch.randn(batch, length, heads, rope, device=device)
    latent = torch.randn(batch, total, columns, device=device)
    key_rope = torch.randn(batch, total, rope, device=device)
    return tuple(x.to(dtype) for x in (query_latent, query_rope, latent, key_rope))


def causal(length, total, filled, device):
    """`[1, 1, S, T]`: the queries are the last of `filled` tokens in a static cache of `total`."""
    position = torch.arange(filled - length, filled, device=device)[:, None]
    return (torch.arange(total, device=device) <= position)[None, None]


def check(op, x, mask=None, tolerance=None):
    expected = exact_decode(*(y.double() for y in x), mask, scale=SCALE)
    assert_close(op(*x, SCALE, mask), expected, "output", tolerance)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, tile, device, triton_kernels) -> None:
    with tiles(*tile):
        check(mla_decode, inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_the_widths_of_v3(dtype, device, triton_kernels) -> None:
    check(mla_decode, inputs((1, 1, 150, 16, 512, 64), dtype, device))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4]])
def test_masks(shape, kind, tile, device, triton_kernels) -> None:
    """Random ones, of each batch row its own and wider than the keys, in which the last query sees nothing."""
    batch, length, total = shape[:3]
    seen = torch.rand(batch, 1, length, total + 9, device=device) < 0.5
    seen[..., 0] = True
    seen[-1, :, -1, :total] = False
    mask = seen
    if kind != torch.bool:
        mask = torch.randn(seen.shape, device=device).to(kind)
        hidden = torch.where(torch.rand(seen.shape, device=device) < 0.5, -torch.inf, torch.finfo(kind).min).to(kind)
        mask = torch.where(seen, mask, hidden)
    x = inputs(shape, torch.float32, device)
    with tiles(*tile):
        check(mla_decode, x, mask)
        assert mla_decode(*x, SCALE, mask)[-1, -1].eq(0).all()
    check(reference.mla_decode, x, mask)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("filled", [4, 32, 70, 200])  # less than a block, a block, some, all of the cache
@pytest.mark.parametrize(("length", "additive"), [(1, False), (1, True), (4, False)])
def test_static_cache(length, additive, filled, tile, device, triton_kernels) -> None:
    """The mask is one for the batch and ends before the cache does; the keys after that are not read, NaN or not."""
    x = inputs((2, length, 200, 8, 16, 16), torch.float32, device)
    mask = causal(length, 256, filled, device)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = exact_decode(*(y.double() for y in x), mask, scale=SCALE)
    unread = -(-filled // tile[1]) * tile[1]
    x[2][:, unread:], x[3][:, unread:] = torch.nan, torch.nan
    with tiles(*tile):
        assert_close(mla_decode(*x, SCALE, mask), expected, "output")


@pytest.mark.parametrize("splits", [1, 2, 9, 21, 30])  # of 21 blocks of keys: the last leaves some empty
@pytest.mark.parametrize("mask", [None, "causal", "nothing"])
def test_number_of_splits(splits, mask, device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(triton_impl, "split_count", lambda *_: splits)
    x = inputs((2, 1, 330, 3, 32, 16), torch.float32, device)
    if mask is not None:
        mask = causal(1, 330, 200 if mask == "causal" else 0, device)
    with tiles(*TILES[1]):
        check(mla_decode, x, mask)


def test_split_count() -> None:
    assert triton_impl.split_count(128, 128, 132) == 1  # nearly all multiprocessors have a program
    assert triton_impl.split_count(2, 128, 132) in range(60, 65)  # few programs: splits, of two blocks or more
    assert triton_impl.split_count(2, 1, 132) == 1
    for programs in (1, 2, 7, 48, 96, 132, 133, 200, 1000):
        splits = triton_impl.split_count(programs, 1024, 132)
        waves = -(-programs * splits // 132)
        assert programs * splits >= 0.85 * 132 * waves, f"{programs} programs in {splits} splits"


@pytest.mark.parametrize("tile", TILES)
def test_large_scores(tile, device, triton_kernels) -> None:
    x = inputs((1, 1, 70, 4, 16, 16), torch.float32, device)
    with tiles(*tile):
        for sign in (100, -100):  # scores in the thousands, of both signs
            assert mla_decode(*(sign * y for y in x[:2]), *(100 * y.abs() for y in x[2:]), SCALE).isfinite().all()


@pytest.mark.parametrize("tile", TILES)
def test_strided_inputs(tile, device, triton_kernels) -> None:
    query_latent, query_rope, latent, key_rope = inputs((2, 2, 40, 4, 32, 16), torch.float32, device)
    mask = torch.rand(2, 1, 2, 40, device=device) < 0.7
    query = torch.cat((query_latent, query_rope), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat((latent, latent), dim=1), torch.cat((key_rope, key_rope), dim=1)  # a longer cache's beginning
    strided = (query[..., :32], query[..., 32:], longer[0][:, :40], longer[1][:, :40])
    unaligned = tuple(torch.cat((x[..., :1], x), dim=-1)[..., 1:] for x in strided)  # no address divides by 16 bytes
    shifted = tuple(torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in strided)
    columns_apart = tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in strided)
    with tiles(*tile):
        expected = mla_decode(query_latent, query_rope, latent, key_rope, SCALE, mask)
        for views in (strided, unaligned, shifted, columns_apart):
            assert torch.equal(mla_decode(*views, SCALE, mask.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize("tile", TILES)
def test_addresses_past_32_bits(tile, device, triton_kernels, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # address space only
    near = inputs((1, 2, 2, 2, 16, 16), torch.bfloat16, device)
    memory = torch.empty(2**32, dtype=torch.bfloat16, device=device)
    far = (
        memory.as_strided((1, 2, 2, 16), (0, 2**31 + 64, 16, 1)),
        memory[64:].as_strided((1, 2, 2, 16), (0, 16, 2**31 + 64, 1)),
        memory[128:].as_strided((1, 2, 16), (0, 2**31 + 64, 1)),
        memory[192:].as_strided((1, 2, 16), (0, 2**31 + 64, 1)),
    )
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    with tiles(*tile):
        assert torch.equal(mla_decode(*far, SCALE), mla_decode(*near, SCALE))


def test_no_rows(device, triton_kernels) -> None:
    assert mla_decode(*inputs((0, 1, 9, 2, 16, 16), torch.float32, device), SCALE).shape == (0, 1, 2, 16)


def test_a_gradient_is_an_error(device, triton_kernels) -> None:
    x = inputs((1, 1, 9, 2, 16, 16), torch.float32, device)
    output = mla_decode(x[0].requires_grad_(), *x[1:], SCALE)
    with pytest.raises(NotImplementedError, match="deepseek_v3::mla_decode has no gradient"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_fp64(dtype) -> None:
    compare(reference.mla_decode, exact_decode, *inputs((2, 3, 30, 4, 8, 4), dtype, "cpu"), scale=SCALE)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_reference_gradients(kind) -> None:
    x = tuple(y.requires_grad_() for y in inputs((1, 2, 5, 2, 3, 2), torch.float64, "cpu"))
    mask = causal(2, 7, 1, "cpu")  # the first query sees nothing
    if kind != torch.bool:
        mask = torch.where(mask, 0.5, -torch.inf).to(kind)
    assert torch.autograd.gradcheck(lambda *y: reference.mla_decode(*y, SCALE, mask), x)


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    x = inputs((1, 2, 9, 2, 16, 16), torch.float32, device)
    mask = causal(2, 9, 9, device)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(mla_decode, backend="aot_eager", fullgraph=True)(*x, SCALE, mask)
        assert torch.equal(found, mla_decode(*x, SCALE, mask))
    torch.library.opcheck(torch.ops.deepseek_v3.mla_decode.default, (*x, SCALE, mask))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query_latent", lambda x: x[..., :16], "query_latent has shape"),
        ("query_latent", lambda x: x[0], "query_latent has shape"),
        ("query_rope", lambda x: x[:, :, 1:], "query_rope has shape"),
        ("latent", lambda x: x.unsqueeze(1), "latent has shape"),
        ("key_rope", lambda x: x[:, 1:], "key_rope has shape"),
        ("key_rope", lambda x: x.half(), "key_rope is torch.float16"),
        ("mask", lambda x: x[..., 1:], "mask has shape"),
        ("mask", lambda x: x[0], "mask has shape"),
        ("mask", lambda x: x.expand(-1, 2, -1, -1), "mask has shape"),
        ("mask", lambda x: x.long(), "mask is torch.int64"),
    ],
)
def test_errors(name, change, message) -> None:
    names = ("query_latent", "query_rope", "latent", "key_rope")
    arguments = dict(zip(names, inputs((2, 2, 9, 2, 32, 16), torch.float32, "cpu"), strict=True))
    arguments |= {"scale": SCALE, "mask": causal(2, 9, 9, "cpu")}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        mla_decode(**arguments)


@pytest.mark.parametrize("columns", [12, 8])
def test_widths_triton_does_not_take(columns, triton_kernels) -> None:
    with pytest.raises(ValueError, match=f"latent has {columns} columns"):
        mla_decode(*inputs((1, 1, 5, 1, columns, 16), torch.float32, "cpu"), SCALE)
    with pytest.raises(ValueError, match=f"key_rope has {columns} columns"):
        mla_decode(*inputs((1, 1, 5, 1, 16, columns), torch.float32, "cpu"), SCALE)
