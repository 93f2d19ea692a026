"""INT4 weights in plain torch: quantizing, dequantizing, and the linear layer a chunk of the weight at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..grouped import expert_rows

CHUNK_ELEMENTS = 2**20  # of the weight, dequantized at once: 2 MiB in bf16 stay in a CPU's cache
CPU_KERNEL_ROWS = 48  # above it, dequantizing once is cheaper than torch's INT4 kernel, whose time is linear in rows
PAIRS = torch.tensor([[(byte & 15) - 8, (byte >> 4) - 8] for byte in range(256)], dtype=torch.int8, device="cpu")
WIDE = {2: torch.int32, 4: torch.int64, 8: torch.complex128}  # bytes of a type -> one of twice as many


class CpuPacked(NamedTuple):
    """Weights in the layout of torch's INT4 kernel, which depends on the CPU: made on load, never saved."""

    weight: torch.Tensor  # [..., out rounded up to 16, in / 2] uint8
    scale_and_zero: torch.Tensor  # [..., in / group, out rounded up to 16, 2] bf16


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / 7.5).to(weight.dtype)
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)  # as compressed-tensors does
    return pack_int4((groups / scale[..., None]).round_().clamp_(-8, 7).flatten(-2)), scale


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Whole numbers -8..7 `[..., in]` -> int32 `[..., in / 8]`."""
    nibbles = (codes + 8).to(torch.int32).unflatten(-1, (-1, 8))
    return (nibbles << torch.arange(0, 32, 4, device=codes.device)).sum(-1, dtype=torch.int32)


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The k-th byte of a row holds its values 2k (low half) and 2k + 1: both are looked up as one element."""
    pairs = PAIRS.to(packed.device, dtype).view(WIDE[dtype.itemsize]).flatten()
    values = pairs.index_select(0, packed.contiguous().view(torch.uint8).flatten().to(torch.int32)).view(dtype)
    values = values.view(*scale.shape, packed.shape[-1] * 8 // scale.shape[-1]).mul_(scale[..., None])
    return values.view(*packed.shape[:-1], packed.shape[-1] * 8)


def pack_int4_for_cpu(packed: torch.Tensor, scale: torch.Tensor) -> CpuPacked:
    if packed.dim() > 2:
        experts = [pack_int4_for_cpu(*expert) for expert in zip(packed, scale, strict=True)]
        return CpuPacked(*(torch.stack(parts) for parts in zip(*experts, strict=True)))
    padding = (0, 0, 0, -packed.shape[0] % 16)
    packed, scale = F.pad(packed, padding), F.pad(scale.to(torch.bfloat16), padding)
    nibbles = (packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.flatten(-2), 1)
    return CpuPacked(weight, torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).contiguous())


def _dequantized(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight as slices of its rows with their values."""
    rows = max(1, CHUNK_ELEMENTS // (packed.shape[1] * 8))
    for start in range(0, packed.shape[0], rows):
        chunk = slice(start, start + rows)
        yield chunk, dequantize_int4(packed[chunk], scale[chunk], dtype)


def _product(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, cpu_packed: CpuPacked | None, out: torch.Tensor
) -> None:
    """`out [rows, out] = x W^T`, with `W` in parts, or in 4 bits as it is."""
    if cpu_packed is not None and x.dtype == torch.bfloat16 and x.shape[0] <= CPU_KERNEL_ROWS:
        group_size = packed.shape[1] * 8 // scale.shape[1]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), cpu_packed[0], group_size, cpu_packed[1])
        out.copy_(y[:, : packed.shape[0]])
        return
    for chunk, weight in _dequantized(packed, scale, x.dtype):
        torch.mm(x, weight.t(), out=out[:, chunk])


def _input_gradient(grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`grad W`, with the parts' shares added in fp32."""
    total = grad.new_zeros(grad.shape[0], packed.shape[1] * 8, dtype=torch.promote_types(grad.dtype, torch.float32))
    for chunk, weight in _dequantized(packed, scale, grad.dtype):
        total += torch.mm(grad[:, chunk], weight)
    return total


class _Int4Linear(torch.autograd.Function):
    """Dequantizes again in backward, so that the whole weight never exists. With `offsets`, only the experts that have
    rows are dequantized."""

    @staticmethod
    def forward(ctx, x, packed, scale, offsets, cpu_packed):
        ctx.save_for_backward(packed, scale, offsets)
        if offsets is None:
            y = x.new_empty(x.shape[0], packed.shape[0])
            _product(x, packed, scale, cpu_packed, y)
            return y
        y = x.new_zeros(x.shape[0], packed.shape[1])
        for expert, rows in expert_rows(offsets):
            own = None if cpu_packed is None else CpuPacked(*(part[expert] for part in cpu_packed))
            _product(x[rows], packed[expert], scale[expert], own, y[rows])
        return y

    @staticmethod
    def backward(ctx, grad):
        packed, scale, offsets = ctx.saved_tensors
        if offsets is None:
            return _input_gradient(grad, packed, scale).to(grad.dtype), None, None, None, None
        total = grad.new_zeros(grad.shape[0], packed.shape[2] * 8)
        for expert, rows in expert_rows(offsets):
            total[rows] = _input_gradient(grad[rows], packed[expert], scale[expert]).to(grad.dtype)
        return total, None, None, None, None


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, cpu_packed: CpuPacked | None = None
) -> torch.Tensor:
    y = _Int4Linear.apply(x.reshape(-1, x.shape[-1]), packed, scale, None, cpu_packed)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def int4_grouped_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    cpu_packed: CpuPacked | None = None,
) -> torch.Tensor:
    return _Int4Linear.apply(x, packed, scale, offsets, cpu_packed)
