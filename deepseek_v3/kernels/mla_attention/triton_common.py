"""How the MLA attention kernels read their inputs, and which blocks a causal mask with documents leaves to them."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..configs import kernel_config

LOG2E = math.log2(math.e)


def rows_source(x: torch.Tensor, rows: int, tma: bool) -> Any:
    """`x [B, rows, heads, columns]` as `load_rows` takes it: a tensor memory descriptor (from Hopper on) or a tuple.

    A descriptor needs addresses that divide by 16 bytes: a tensor with others is copied.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not tma:
        return x, *x.stride()[:3], x.shape[1]
    strides = [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape, x.stride(), strict=True)]
    if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in strides[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() may be the same memory
        strides = list(x.stride())
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, rows, 1, x.shape[-1]])


def block_config(kernel: str, query: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    """The kernel's configuration for these columns (of query and value) and element size."""
    columns = query.shape[-1] + value.shape[-1]
    return kernel_config(kernel, query.device, columns=columns, bytes=query.element_size())


@triton.jit
def load_rows(source, batch, first, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Rows `first`, `first + 1` ... of one head, `[ROWS, COLUMNS]`, zero past the last row. See `rows_source`."""
    if TMA:
        return source.load([batch, first, head, 0]).reshape(ROWS, COLUMNS)
    else:
        pointer, batch_stride, row_stride, head_stride, rows = source
        pointer += tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        pointer += tl.cast(first, tl.int64) * row_stride
        row = tl.arange(0, ROWS)[:, None]
        return tl.load(pointer + row * row_stride + tl.arange(0, COLUMNS)[None, :], mask=row < rows - first, other=0.0)


@triton.jit
def key_runs(first, starts, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The key blocks of the queries at positions `first`, `first + 1` ..., as the four bounds of three runs.

    In the first run a document begins, the second every query sees whole, and the third is on the diagonal. Only the
    second, nearly all of a long sequence, goes without a mask. No query sees a block before the first run.
    """
    end = tl.minimum(first + BLOCK_M, T)
    diagonal = (first + 1) // BLOCK_N * BLOCK_N
    begin = diagonal * 0
    whole = begin
    if DOCUMENTS:
        begin = tl.minimum(tl.maximum(tl.min(starts, 0), 0) // BLOCK_N * BLOCK_N, end)
        diagonal = tl.maximum(diagonal, begin)
        whole = tl.cdiv(tl.maximum(tl.max(starts, 0), 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(tl.maximum(whole, begin), diagonal)
    return begin, whole, diagonal, end


@triton.jit
def query_runs(first, starts_ptr, S, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The query blocks of the keys `first`, `first + 1` ..., as the four bounds of three runs.

    The first run is on the diagonal, the second sees all these keys, and in the third a later document begins. No
    query outside the runs sees any of the keys. `starts_ptr` is that of the sequence, `[S]`.
    """
    diagonal = first - (T - S)  # the query on the position of the first key
    begin = tl.maximum(diagonal, 0) // BLOCK_M * BLOCK_M
    end = begin * 0 + S
    whole = end
    if DOCUMENTS:
        SCAN: tl.constexpr = 1024
        end = begin
        for block in range(begin, S, SCAN):
            row = block + tl.arange(0, SCAN)
            start = tl.load(starts_ptr + row, mask=row < S, other=T)
            end = tl.maximum(end, tl.max(tl.where(start < first + BLOCK_N, row + 1, 0), 0))
            whole = tl.minimum(whole, tl.min(tl.where(start > first, row, S), 0))
        end = tl.minimum(end, S)
        whole = whole // BLOCK_M * BLOCK_M
    diagonal = tl.minimum(tl.cdiv(tl.maximum(diagonal + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M, end)
    whole = tl.minimum(tl.maximum(whole, diagonal), end)
    return begin, diagonal, whole, end
