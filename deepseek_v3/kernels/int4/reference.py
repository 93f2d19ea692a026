"""INT4 weights in plain torch: quantizing, dequantizing, and the linear layer a chunk of the weight at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 2**20  # of the weight, dequantized at once: 2 MiB in bf16 stay in a CPU's cache
CPU_KERNEL_ROWS = 64  # above it, dequantizing once is cheaper than torch's INT4 kernel, whose time is linear in rows


class CpuPacked(NamedTuple):
    """One weight in the layout of torch's INT4 kernel, which depends on the CPU: made on load, never saved."""

    weight: torch.Tensor  # [out rounded up to 16, in / 2] uint8
    scale_and_zero: torch.Tensor  # [in / group, out rounded up to 16, 2] bf16


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / 7.5).to(weight.dtype)
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)  # as compressed-tensors does
    values = (groups / scale[..., None]).round_().clamp_(-8, 7).flatten(-2)
    nibbles = (values + 8).to(torch.int32).unflatten(-1, (-1, 8))
    return (nibbles << torch.arange(0, 32, 4, device=weight.device)).sum(-1, dtype=torch.int32), scale


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pairs = packed.contiguous().view(torch.uint8)  # the k-th byte of a row holds its values 2k (low half) and 2k + 1
    values = torch.stack((pairs & 15, pairs >> 4), dim=-1).to(dtype).sub_(8)  # exact in every dtype
    values = values.view(*scale.shape, packed.shape[-1] * 8 // scale.shape[-1]).mul_(scale[..., None])
    return values.view(*packed.shape[:-1], -1)


def pack_int4_for_cpu(packed: torch.Tensor, scale: torch.Tensor) -> CpuPacked:
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


class _Int4Linear(torch.autograd.Function):
    """Dequantizes again in backward, so that the whole weight never exists."""

    @staticmethod
    def forward(ctx, x, packed, scale, cpu_packed):
        ctx.save_for_backward(packed, scale)
        if cpu_packed is not None and x.dtype == torch.bfloat16 and x.shape[0] <= CPU_KERNEL_ROWS:
            group_size = packed.shape[1] * 8 // scale.shape[1]
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), cpu_packed[0], group_size, cpu_packed[1])
            return y[:, : packed.shape[0]]
        y = x.new_empty(x.shape[0], packed.shape[0])
        for chunk, weight in _dequantized(packed, scale, x.dtype):
            torch.mm(x, weight.t(), out=y[:, chunk])
        return y

    @staticmethod
    def backward(ctx, grad):
        packed, scale = ctx.saved_tensors
        total = grad.new_zeros(
            grad.shape[0], packed.shape[1] * 8, dtype=torch.promote_types(grad.dtype, torch.float32)
        )
        for chunk, weight in _dequantized(packed, scale, grad.dtype):
            total += torch.mm(grad[:, chunk], weight)
        return total.to(grad.dtype), None, None, None


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, cpu_packed: CpuPacked | None = None
) -> torch.Tensor:
    y = _Int4Linear.apply(x.reshape(-1, x.shape[-1]), packed, scale, cpu_packed)
    return y.reshape(*x.shape[:-1], packed.shape[0])
