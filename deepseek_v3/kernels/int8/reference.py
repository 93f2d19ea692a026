"""INT8 weights and activations in plain torch, exact up to the last rounding."""

import torch

from ..blocks import row_blocks
from ..grouped import expert_rows

SMALLEST_SCALE = 2.0**-126  # of activations: the smallest normal number, so that a row of zeros divides by something
HAS_VNNI = torch.cpu._is_vnni_supported()
EXACT_COLUMNS = 1024  # products of int8 whose sum, at most 2^24, fp32 holds exactly


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(-1, keepdim=True) / 127).to(weight.dtype)
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)  # as compressed-tensors does
    return (wide / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(dtype).mul_(scale)  # the codes are exact in every dtype, and torch multiplies in the wider one


def quantize_activation_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    for x_, codes_, scale_ in row_blocks(x, codes, scale):
        wide = x_.float()
        scale_.copy_(wide.abs().amax(1, keepdim=True).div_(127).clamp_(min=SMALLEST_SCALE))
        codes_.copy_(wide.div(scale_).round_())
    return codes, scale


def int8_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` of int8 `[M, K]` and `[N, K]`, exact, in `out [M, N]` int32.

    oneDNN's product is used where the CPU has the instruction for it (VNNI): elsewhere sums of two products, in int16,
    could saturate. For a single column torch 2.13's result is wrong.
    """
    if a.device.type == "cpu" and HAS_VNNI and a.shape[1] > 1:
        return torch._int_mm(a, b.t(), out=out)
    out.zero_()
    part = torch.empty(out.shape, dtype=torch.float32, device=a.device)
    for a_, b_ in zip(a.split(EXACT_COLUMNS, 1), b.split(EXACT_COLUMNS, 1), strict=True):
        out += torch.mm(a_.float(), b_.float().t(), out=part).to(torch.int32)  # `out`: no autocast
    return out


class _Int8Linear(torch.autograd.Function):
    """Dequantizes in backward. With `offsets`, only the experts that have rows are read."""

    @staticmethod
    def forward(ctx, x, codes, scale, offsets):
        ctx.save_for_backward(codes, scale, offsets)
        x_codes, x_scale = quantize_activation_int8(x)
        y = x.new_empty(x.shape[0], codes.shape[-2])
        if offsets is None:
            sums = int8_product(x_codes, codes, torch.empty(y.shape, dtype=torch.int32, device=x.device))
            for y_, sums_, x_scale_ in row_blocks(y, sums, x_scale):
                y_.copy_(_scaled(sums_, scale, x_scale_))
            return y
        experts = list(expert_rows(offsets))
        most_rows = max((rows.stop - rows.start for _, rows in experts), default=0)
        # The experts share one: on a CPU the pages of new memory cost more than the product.
        sums = torch.empty(most_rows, codes.shape[1], dtype=torch.int32, device=x.device)
        for expert, rows in experts:
            sums_ = int8_product(x_codes[rows], codes[expert], sums[: rows.stop - rows.start])
            y[rows] = _scaled(sums_, scale[expert], x_scale[rows])
        y[int(offsets[-1]) :] = 0
        return y

    @staticmethod
    def backward(ctx, grad):
        codes, scale, offsets = ctx.saved_tensors
        if offsets is None:
            return torch.mm(grad, dequantize_int8(codes, scale, grad.dtype)), None, None, None
        total = grad.new_zeros(grad.shape[0], codes.shape[2])
        for expert, rows in expert_rows(offsets):
            torch.mm(grad[rows], dequantize_int8(codes[expert], scale[expert], grad.dtype), out=total[rows])
        return total, None, None, None


def _scaled(sums: torch.Tensor, scale: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
    return sums.float().mul_(scale.float().t()).mul_(x_scale)


def int8_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y = _Int8Linear.apply(x.reshape(-1, x.shape[-1]), codes, scale, None)
    return y.view(*x.shape[:-1], codes.shape[0])


def int8_grouped_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    return _Int8Linear.apply(x, codes, scale, offsets)
