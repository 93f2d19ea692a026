"""Matrix products of FP8 operands with fine-grained scales (DeepSeek-V3, section 3.3), and linear layers made of them.

Operands and scales come from `fp8_quant`; both operands lie along the contraction (`a [M, K]`, `b [N, K]`). Each 128
products along K are summed by the tensor cores, scaled, and added in fp32: the paper's promotion interval.
"""

import torch

from ..dispatch import custom_op, uses_triton
from ..grouped import check_offsets
from . import reference

E4M3 = torch.float8_e4m3fn


def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`a @ b.T` of the dequantized operands: `a [M, K]`, `b [N, K]` e4m3 -> `[M, N]` in `out_dtype`.

    `a_scale [M, ceil(K/128)]` fp32 is one per 1x128 tile; `b_scale` is one per 128x128 block, `[ceil(N/128),
    ceil(K/128)]`, for a weight (forward and the input's gradient), or one per 1x128 tile, `[N, ceil(K/128)]`, for an
    activation (the weight's gradient). Scales may have any strides.
    """
    _check_operand("a", a, a_scale, [a.shape[0]])
    _check_operand("b", b, b_scale, [b.shape[0], _tiles(b.shape[0])])
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b is {list(b.shape)}; a {list(a.shape)} needs [N, {a.shape[1]}]")
    if not uses_triton(a_scale):
        return reference.gemm(a, a_scale, b, b_scale, out_dtype)
    return torch.ops.deepseek_v3.fp8_gemm(a, a_scale, b, b_scale, None, out_dtype)


def fp8_grouped_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Each expert's rows times its matrix: `a [M, K]` sorted by expert, `b [E, N, K]` -> `[M, N]` in `out_dtype`.

    Expert e has the rows from `offsets[e]` to `offsets[e+1]`: int32 `[E+1]` from 0 to M, on the device, never read by
    the host. Scales: `[M, ceil(K/128)]` and `[E, ceil(N/128), ceil(K/128)]`.
    """
    _check_operand("a", a, a_scale, [a.shape[0]])
    check_offsets(offsets)
    needed = [offsets.shape[0] - 1, a.shape[1]]
    if b.dtype != E4M3 or b.ndim != 3 or [b.shape[0], b.shape[2]] != needed:
        raise ValueError(f"b is {b.dtype} {list(b.shape)}; needed: {E4M3} [{needed[0]}, N, {needed[1]}]")
    blocks = [b.shape[0], _tiles(b.shape[1]), _tiles(b.shape[2])]
    if b_scale.dtype != torch.float32 or list(b_scale.shape) != blocks:
        raise ValueError(f"b_scale is {b_scale.dtype} {list(b_scale.shape)}; b {list(b.shape)} needs fp32 {blocks}")
    if not uses_triton(a_scale):
        return reference.grouped_gemm(a, a_scale, b, b_scale, offsets, out_dtype)
    return torch.ops.deepseek_v3.fp8_gemm(a, a_scale, b, b_scale, offsets, out_dtype)


def fp8_grouped_wgrad(
    grad_t: torch.Tensor,
    grad_t_scale: torch.Tensor,
    x_t: torch.Tensor,
    x_t_scale: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Each expert's `grad.T @ x` -> `[E, N, K]` in `out_dtype`, zeros for an expert without rows.

    Operands are `quantize_activation_fp8_transposed(grad [M, N], offsets)` and the same of `x [M, K]`, so no tile of
    128 rows holds rows of two experts: `[N, T*128]` and `[K, T*128]` with scales `[N, T]` and `[K, T]`.
    """
    _check_operand("grad_t", grad_t, grad_t_scale, [grad_t.shape[0]])
    _check_operand("x_t", x_t, x_t_scale, [x_t.shape[0]])
    check_offsets(offsets)
    if grad_t.shape[1] != x_t.shape[1] or x_t.shape[1] % reference.TILE:
        raise ValueError(
            f"x_t is {list(x_t.shape)} and grad_t {list(grad_t.shape)}; needed: [K, T*128] and [N, T*128]"
        )
    if not uses_triton(grad_t_scale):
        return reference.grouped_wgrad(grad_t, grad_t_scale, x_t, x_t_scale, offsets, out_dtype)
    return torch.ops.deepseek_v3.fp8_grouped_wgrad(grad_t, grad_t_scale, x_t, x_t_scale, offsets, out_dtype)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` with all three matrix products of training in FP8: `x [..., K]`, `weight [N, K]` -> `[..., N]`.

    Output and the gradient of x have `x`'s dtype, the weight's gradient that of the weight. Forward quantizes x in
    1x128 tiles and the weight in 128x128 blocks; backward the incoming gradient in 1x128 tiles along N for the
    gradient of x, and x and the gradient in 128x1 tiles along the rows for the gradient of the weight. Of x, only
    those codes (1 byte per element) are kept, made in forward from x itself, not from its codes.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight is {list(weight.shape)}; x {list(x.shape)} needs [N, {x.shape[-1]}]")
    return _apply(x.reshape(-1, x.shape[-1]), weight, None).view(*x.shape[:-1], weight.shape[0])


def fp8_grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`fp8_linear` with one weight per expert: `x [M, K]` sorted by expert, `weight [E, N, K]` -> `[M, N]`.

    `offsets` as in `fp8_grouped_gemm`.
    """
    check_offsets(offsets)
    needed = [offsets.shape[0] - 1, x.shape[-1]]
    if x.ndim != 2 or weight.ndim != 3 or [weight.shape[0], weight.shape[2]] != needed:
        raise ValueError(f"weight is {list(weight.shape)}; x {list(x.shape)} needs [{needed[0]}, N, {needed[1]}]")
    return _apply(x, weight, offsets)


def _apply(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    if not uses_triton(x):
        return reference.linear(x, weight, offsets)
    save = weight.requires_grad and torch.is_grad_enabled()
    return torch.ops.deepseek_v3.fp8_linear(x, weight, offsets, save)[0]


def _tiles(size: int) -> int:
    return -(-size // reference.TILE)


def _check_operand(name: str, codes: torch.Tensor, scale: torch.Tensor, rows: list[int]) -> None:
    if codes.dtype != E4M3 or codes.ndim != 2:
        raise ValueError(f"{name} is {codes.dtype} {list(codes.shape)}; allowed: 2-D {E4M3}")
    allowed = [[n, _tiles(codes.shape[1])] for n in rows]
    if scale.dtype != torch.float32 or list(scale.shape) not in allowed:
        found = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(
            f"{name}_scale is {found}; {name} {list(codes.shape)} needs fp32 {' or '.join(map(str, allowed))}"
        )


@custom_op("deepseek_v3::fp8_gemm")
def _gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    offsets: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    from .triton_impl import gemm

    return gemm(a, a_scale, b, b_scale, offsets, out_dtype)


@_gemm.register_fake
def _(a, a_scale, b, b_scale, offsets, out_dtype):
    return a.new_empty(a.shape[0], b.shape[-2], dtype=out_dtype)


@custom_op("deepseek_v3::fp8_grouped_wgrad")
def _grouped_wgrad(
    grad_t: torch.Tensor,
    grad_t_scale: torch.Tensor,
    x_t: torch.Tensor,
    x_t_scale: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    from .triton_impl import grouped_wgrad

    return grouped_wgrad(grad_t, grad_t_scale, x_t, x_t_scale, offsets, out_dtype)


@_grouped_wgrad.register_fake
def _(grad_t, grad_t_scale, x_t, x_t_scale, offsets, out_dtype):
    return grad_t.new_empty(offsets.shape[0] - 1, grad_t.shape[0], x_t.shape[0], dtype=out_dtype)


@custom_op("deepseek_v3::fp8_linear")
def _linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import linear_forward

    return linear_forward(x, weight, offsets, save)


@_linear.register_fake
def _(x, weight, offsets, save):
    saved = torch.ops.deepseek_v3.quantize_activation_fp8(x, offsets, False, save, False)[2:]
    return x.new_empty(x.shape[0], weight.shape[-2]), *saved


@custom_op("deepseek_v3::fp8_linear_backward")
def _linear_backward(
    grad: torch.Tensor,
    x_t: torch.Tensor,
    x_t_scale: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_impl import linear_backward

    return linear_backward(grad, x_t, x_t_scale, weight, offsets, needs_x, needs_weight)


@_linear_backward.register_fake
def _(grad, x_t, x_t_scale, weight, offsets, needs_x, needs_weight):
    grad_x = grad.new_empty((grad.shape[0], weight.shape[-1]) if needs_x else 0)
    return grad_x, weight.new_empty(weight.shape if needs_weight else 0)


def _setup_context(ctx, inputs, output):
    _, weight, offsets, _ = inputs
    ctx.save_for_backward(*output[1:], weight, offsets)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    x_t, x_t_scale, weight, offsets = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.deepseek_v3.fp8_linear_backward(
        grad, x_t, x_t_scale, weight, offsets, needs_x, needs_weight
    )
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None


_linear.register_autograd(_autograd, setup_context=_setup_context)
