"""Kernels around cuBLAS: the softmax of a chunk of logits with its gradient in place, and a scaled copy.

A chunk's logits are one matrix product, and its two gradients one each; so chunks are large, and the kernels between
the products only read and write memory.
"""

import torch
import triton
import triton.language as tl

from ..configs import kernel_config
from .reference import largest_weight

# Logits of one chunk. At V = 129,280 these are 8,192 rows in bf16: the weight's gradient, read and written once per
# chunk, then costs about 4 % of the chunk's products.
CHUNK_BYTES = 2**31


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # [rows, vocabulary], row stride logits_stride; replaced by their gradient if GRAD
    labels_ptr,  # [rows] int64
    weights_ptr,  # [rows] fp32: what the row's gradient is multiplied by
    nll_ptr,  # [rows] fp32
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
):
    """One program per row, which it reads twice: the second time backwards, as its end is still in the cache."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    label = tl.load(labels_ptr + row)
    weight = tl.load(weights_ptr + row)
    label_logit = tl.load(logits_ptr + label).to(tl.float32)

    largest = -float("inf")
    total = 0.0  # sum of exp(logit - largest)
    for start in range(0, VOCAB, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < VOCAB, other=-float("inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), axis=0)
        largest = new_largest
    nll = tl.log(total) + (largest - label_logit)
    counts = weight != 0  # a row that does not count may hold logits that overflow
    tl.store(nll_ptr + row, tl.where(counts | (tl.abs(nll) < float("inf")), nll, 0.0))

    if GRAD:
        scale = weight / total
        last = (VOCAB - 1) // BLOCK * BLOCK
        for start in range(0, VOCAB, BLOCK):
            column = last - start + tl.arange(0, BLOCK)
            mask = column < VOCAB
            logits = tl.load(logits_ptr + column, mask=mask, other=-float("inf")).to(tl.float32)
            grad = tl.exp(logits - largest) * scale - tl.where(column == label, weight, 0.0)
            grad = tl.where(counts, grad, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(
    x_ptr,  # [size]
    factor_ptr,  # one fp32 number
    y_ptr,  # [size]
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * tl.load(factor_ptr)).to(y_ptr.dtype.element_ty), mask=at < size)


def _chunk_rows(rows: int, vocab: int, itemsize: int) -> int:
    """Rows per chunk: within `CHUNK_BYTES`, chunks of about equal size, in whole tiles of a matrix product."""
    most = max(128, CHUNK_BYTES // (vocab * itemsize))
    return triton.cdiv(triton.cdiv(rows, triton.cdiv(rows, most)), 128) * 128


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` for `total` fp32. On a GPU the product itself adds: no other pass over memory, no rounding."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # the interpreter's tensors: CPU products have no fp32 output
        total += torch.mm(a, b)


def linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    row_weights: torch.Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss, `nll [N]`, the gradients of hidden (its dtype) and of the weight (fp32) for a largest row weight of 1
    (empty where not needed), and the largest row weight."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    needs_grad = needs_hidden or needs_weight
    labels = labels.contiguous()
    nll = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    grad_weight = weight.new_zeros(weight.shape if needs_weight else (0,), dtype=torch.float32)
    largest = largest_weight(row_weights)
    relative_weights = row_weights / largest
    if rows:
        chunk_rows = _chunk_rows(rows, vocab, hidden.element_size())
        # rows begin at a multiple of 128 bytes, which fast products need, whatever the vocabulary
        stride = triton.cdiv(vocab, 64) * 64
        buffer = hidden.new_empty(min(chunk_rows, rows), stride)
        buffer[:, vocab:].zero_()  # oneDNN multiplies the end of a row, where it is NaN, into the gradient
        config = kernel_config("cross_entropy", hidden.device, vocab=vocab)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            logits = buffer[: chunk.stop - start, :vocab]
            torch.mm(hidden[chunk], weight.t(), out=logits)
            _cross_entropy_kernel[(logits.shape[0],)](
                logits,
                labels[chunk],
                relative_weights[chunk],
                nll[chunk],
                stride,
                VOCAB=vocab,
                GRAD=needs_grad,
                **config,
            )
            if needs_hidden:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            if needs_weight:
                _add_product(grad_weight, logits.t(), hidden[chunk])
    return (nll * row_weights).sum(), nll, grad_hidden, grad_weight, largest


def linear_cross_entropy_backward(
    relative_grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`relative_grad * factor`, multiplied in fp32; `factor` stays on the device."""
    grad = torch.empty(relative_grad.shape, dtype=dtype, device=relative_grad.device)
    config = kernel_config("cross_entropy_scale", grad.device)
    if grad.numel():
        _scale_kernel[(triton.cdiv(grad.numel(), config["BLOCK"]),)](
            relative_grad, factor, grad, grad.numel(), **config
        )
    return grad
