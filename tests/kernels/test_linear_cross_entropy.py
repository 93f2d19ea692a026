import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_v3.kernels.dispatch import kernels
from deepseek_v3.kernels.linear_cross_entropy import linear_cross_entropy, reference
from tests.kernels.checks import DTYPES, TOLERANCE, assert_close, assert_compiles, compare

SHAPES = [  # N, H, V
    (1, 16, 32),  # one row
    (13, 24, 97),  # odd vocabulary: a masked tail, and rows of the logits that are not adjacent
    (3, 32, 4100),  # a row is three blocks of the kernel, the last not full
    (130, 16, 40),  # two chunks where a chunk is 128 rows, the second not full
]


def exact(hidden, weight, labels, row_weights):
    nll = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    return (nll * row_weights.detach()).sum(), nll.detach()


def compare_(op, exact_, *tensors) -> None:
    """`compare` with the tolerance of hidden's dtype for the fp32 loss too: it comes from logits in that dtype."""
    compare(op, exact_, *tensors, tolerance=TOLERANCE[tensors[0].dtype])


def inputs(shape, dtype, device):
    rows, hidden_size, vocab = shape
    hidden = torch.randn(rows, hidden_size, device=device).to(dtype)
    weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    row_weights = torch.rand(rows, device=device) + 0.01
    row_weights[1::3] = 0
    return hidden, weight, torch.randint(vocab, (rows,), device=device), row_weights


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 rows, the fewest that the launcher makes."""
    from deepseek_v3.kernels.linear_cross_entropy import triton_impl

    monkeypatch.setattr(triton_impl, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, device, triton_kernels, small_chunks) -> None:
    compare_(linear_cross_entropy, exact, *inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 4, 13, 100])
def test_reference_against_fp64(chunk_rows, dtype, monkeypatch) -> None:
    monkeypatch.setattr(reference, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk_rows * 97 + 50)
    compare_(reference.linear_cross_entropy, exact, *inputs((13, 24, 97), dtype, "cpu"))


def test_gradcheck_of_the_reference(monkeypatch) -> None:
    monkeypatch.setattr(reference, "MIN_CHUNK_ROWS", 2)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    hidden, weight, labels, row_weights = inputs((5, 3, 7), torch.float64, "cpu")

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, row_weights)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))
    assert loss(hidden, weight).dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 8192, 16384 + 1])
def test_chunks_are_bounded_and_about_equal(rows) -> None:
    from deepseek_v3.kernels.linear_cross_entropy.triton_impl import CHUNK_BYTES, _chunk_rows

    for vocab in (97, 129280, 163840):
        chunk = _chunk_rows(rows, vocab, 2)
        chunks = -(-rows // chunk)
        assert chunk % 128 == 0 and chunk <= CHUNK_BYTES / (2 * vocab) + 128
        assert chunk * chunks < rows + 128 * chunks


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_second_backward_gives_the_same(implementation, device) -> None:
    hidden, weight, labels, row_weights = inputs((5, 8, 11), torch.bfloat16, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with kernels(implementation):
        loss, _ = linear_cross_entropy(hidden, weight, labels, row_weights)
        first = torch.autograd.grad(4 * loss, leaves, retain_graph=True)
        kept = [grad.clone() for grad in first]
        second = torch.autograd.grad(8 * loss, leaves)
    for grad, before, twice in zip(first, kept, second, strict=True):
        assert torch.equal(grad, before) and torch.equal(2 * grad, twice)


def wanted_products(hidden, weight, labels, row_weights, monkeypatch) -> int:
    """How many matrix products one call takes, its one chunk of logits among them."""
    count, multiply = 0, torch.mm

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return multiply(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", counted)
        linear_cross_entropy(hidden, weight, labels, row_weights)
    return count


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_nothing_is_computed_for_a_frozen_input(frozen, device, triton_kernels, monkeypatch) -> None:
    hidden, weight, labels, row_weights = inputs((5, 8, 11), torch.float32, device)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    if not hidden.is_cuda:  # there the weight's product is an addmm
        assert wanted_products(hidden, weight, labels, row_weights, monkeypatch) == (1 if frozen == "both" else 2)
    loss, nll = linear_cross_entropy(hidden, weight, labels, row_weights)
    expected, _ = exact(hidden, weight, labels, row_weights)
    assert_close(loss, expected, "loss")
    assert loss.requires_grad == (frozen != "both") and not nll.requires_grad
    for leaf in (hidden, weight):
        if leaf.requires_grad:
            ours, theirs = (torch.autograd.grad(total, leaf)[0] for total in (loss, expected))
            assert_close(ours, theirs, "gradient")


def test_no_grad_computes_the_loss_alone(device, triton_kernels, monkeypatch) -> None:
    hidden, weight, labels, row_weights = inputs((5, 8, 11), torch.float32, device)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        assert wanted_products(hidden, weight, labels, row_weights, monkeypatch) == 1
        loss, nll = linear_cross_entropy(hidden, weight, labels, row_weights)
    assert not loss.requires_grad
    assert_close(nll, exact(hidden.double(), weight.double(), labels, row_weights)[1], "nll")


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype, device, triton_kernels) -> None:
    """Of +-1e3, where one exponential is far outside any range; integers, so that bf16 holds the logits exactly."""
    hidden = torch.eye(4, 16, device=device, dtype=dtype)
    weight = 8 * torch.randint(-125, 126, (40, 16), device=device).to(dtype)
    labels, row_weights = torch.randint(40, (4,), device=device), torch.rand(4, device=device) + 0.1
    assert hidden.mm(weight.t()).abs().max() > 900
    compare_(linear_cross_entropy, exact, hidden, weight, labels, row_weights)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where the interpreter subtracts infinities
def test_a_row_of_weight_zero_may_hold_anything_finite(device, triton_kernels) -> None:
    hidden, weight, labels, row_weights = inputs((6, 16, 40), torch.float16, device)
    hidden[1::3] = 60000.0
    row_weights[1::3] = 0
    weight[:, 0] = 10.0  # the logits overflow
    loss, nll = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, row_weights)
    loss.backward()
    counts = row_weights > 0
    clean, leaf = hidden.detach()[counts].double(), weight.detach().double().requires_grad_()
    expected, expected_nll = exact(clean, leaf, labels[counts], row_weights[counts].double())
    assert nll.isfinite().all() and not hidden.grad[~counts].any()
    assert_close(nll[counts], expected_nll, "nll", 1e-3)
    assert_close(loss, expected, "loss", 1e-3)
    assert_close(weight.grad, torch.autograd.grad(expected, leaf)[0], "gradient of the weight")


def test_rows_that_all_have_weight_zero(device, triton_kernels) -> None:
    hidden, weight, labels, row_weights = inputs((6, 16, 40), torch.float32, device)
    loss, nll = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, 0 * row_weights)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()
    assert_close(nll, exact(hidden.double(), weight.double(), labels, row_weights)[1], "nll")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_gradients_survive_small_row_weights(implementation, dtype, device) -> None:
    """A row of a big batch weighs 1e-6: times a probability, that is nothing in fp16, and a loss scale comes later."""
    hidden, weight, labels, _ = inputs((48, 16, 500), dtype, device)
    row_weights, scale = torch.full((48,), 1e-6, device=device), 2.0**16

    def scaled(op):
        return lambda *args: scale * op(*args, labels, row_weights)[0]

    with kernels(implementation):
        compare_(scaled(linear_cross_entropy), scaled(exact), hidden, weight)


def test_no_rows(device, triton_kernels) -> None:
    hidden, weight, labels, row_weights = inputs((0, 16, 40), torch.bfloat16, device)
    loss, nll = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, row_weights)
    loss.backward()
    assert loss == 0 and nll.shape == (0,) and hidden.grad.shape == (0, 16) and not weight.grad.any()


def test_strided_inputs(device, triton_kernels) -> None:
    hidden, weight, labels, row_weights = inputs((8, 32, 40), torch.float32, device)
    args = hidden[:, ::2], weight[:, ::2], labels.repeat_interleave(2)[::2], row_weights[:1].expand(8)
    loss, nll = linear_cross_entropy(*args)
    expected, expected_nll = exact(*args)
    assert_close(loss, expected, "loss")
    assert_close(nll, expected_nll, "nll")


def test_addresses_past_32_bits(device, triton_kernels, monkeypatch) -> None:
    from deepseek_v3.kernels.linear_cross_entropy.triton_impl import _cross_entropy_kernel

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 4 GiB of address space only
    logits = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
    logits.copy_(torch.randn(3, 64))
    exact_nll = -logits.double().log_softmax(1)[:, 5]
    exact_grad = logits.double().softmax(1)
    exact_grad[:, 5] -= 1
    labels, nll = torch.full((3,), 5, device=device), torch.empty(3, device=device)
    _cross_entropy_kernel[(3,)](
        logits, labels, torch.ones(3, device=device), nll, 2**30, VOCAB=64, BLOCK=64, GRAD=True
    )
    assert_close(nll, exact_nll, "nll")
    assert_close(logits, exact_grad, "gradient")


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in tree_leaves(output) if isinstance(x, torch.Tensor))])
        return output


def test_memory_does_not_grow_with_rows_times_vocabulary(device, triton_kernels, small_chunks) -> None:
    from deepseek_v3.kernels.linear_cross_entropy.triton_impl import linear_cross_entropy_forward

    args = inputs((260, 4, 200), torch.float32, device)
    with LargestTensor() as largest:
        linear_cross_entropy_forward(*args, True, True)
    assert largest.bytes == 128 * 256 * 4  # a chunk of logits, its rows padded


def test_torch_compile_and_opcheck(device, triton_kernels) -> None:
    hidden, weight, labels, row_weights = inputs((6, 16, 40), torch.float32, device)
    assert_compiles(linear_cross_entropy, hidden, weight, labels, row_weights)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(
        torch.ops.deepseek_v3.linear_cross_entropy.default, (*leaves, labels, row_weights, True, True)
    )
    args = (hidden.detach(), row_weights[0], torch.bfloat16)
    torch.library.opcheck(torch.ops.deepseek_v3.linear_cross_entropy_backward.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, r"hidden is \[3, 4\] and weight \[7, 5\]"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "weight torch.bfloat16"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels is \[2\]"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels is torch.int32"),
        ({"row_weights": torch.zeros(3, 1)}, r"row_weights is \[3, 1\]"),
    ],
)
def test_wrong_input_is_named(change, message) -> None:
    args = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
        "row_weights": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**args, **change})
