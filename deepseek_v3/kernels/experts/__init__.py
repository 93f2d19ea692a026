"""The routed experts of DeepSeekMoE (paper 2.1.2, eq. 12): a stable sort of the choices and grouped matrix products.

Shape legend: N tokens, E experts, K chosen per token, H hidden, I expert's intermediate size. A *choice* is one entry
of `indices`, numbered `token * K + k`; a *slot* is a choice's position once choices are sorted by expert.
"""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference, torch_impl


def permutation(indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the choices `indices [N, K]` (int64 in [0, E]) by expert, stable, without waiting for the device.

    -> `order [N*K]`, the choice in each slot; `slots [N, K]`, the slot of each choice (the inverse); `offsets [E+1]`:
    expert e has slots `offsets[e]` to `offsets[e+1]`, and from `offsets[E]` on are the choices of value E. All int32.
    """
    if indices.dim() != 2 or indices.dtype != torch.int64:
        raise ValueError(f"indices is {indices.dtype} {list(indices.shape)}; allowed: torch.int64 [N, K]")
    if not uses_triton(indices.new_empty(0, dtype=torch.float32)):  # the rule is for floating-point tensors
        return reference.permutation(indices, num_experts)
    return torch.ops.deepseek_v3.expert_permutation(indices, num_experts)


def grouped_swiglu_experts(
    hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * down_e(silu(gate_e x_t) * up_e x_t)` with `e = indices[t, k]` (paper eq. 12).

    `hidden [N, H]`, `indices [N, K]` int64 in [0, E], `weights [N, K]` fp32, `gate_up [E, 2I, H]` (gate rows, then up
    rows), `down [E, H, I]` -> `[N, H]`; `hidden`, `gate_up` and `down` share one floating-point dtype, which is the
    result's, and the sum over k is in fp32. An index of E marks a choice that another expert-parallel rank computes:
    it adds nothing and gets no gradient. No token is dropped. Differentiable in all but `indices`.

    With Triton, backward computes the activations anew from `hidden`, so that nothing of the size `[N*K, I]` is kept
    for it; torch's grouped products, which serve CPUs, keep the gate and up projections.
    """
    check_shapes(hidden, indices, weights, gate_up, down)
    for name, parameter in (("gate_up", gate_up), ("down", down)):
        check_dtype(name, parameter, hidden)
    triton = uses_triton(hidden)
    if not triton and not torch_impl.fits(hidden, down):
        return reference.grouped_swiglu_experts(hidden, indices, weights, gate_up, down)
    if not triton and torch_impl.is_one_token(hidden):
        return torch_impl.one_token(hidden, indices, weights, gate_up, down)
    order, slots, offsets = permutation(indices, gate_up.shape[0])
    keep = not triton and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return torch.ops.deepseek_v3.grouped_swiglu_experts(hidden, weights, gate_up, down, order, slots, offsets, keep)[0]


def check_shapes(hidden, indices, weights, gate_up, down) -> None:
    """ValueError unless they are those of `grouped_swiglu_experts`."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; allowed: [N, H]")
    tokens, width = hidden.shape
    if indices.dim() != 2 or indices.shape[0] != tokens or indices.dtype != torch.int64:
        raise ValueError(f"indices is {indices.dtype} {list(indices.shape)}; allowed: torch.int64 [{tokens}, K]")
    if weights.shape != indices.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}; allowed: that of indices, {list(indices.shape)}")
    if len(gate_up.shape) != 3 or gate_up.shape[1] % 2 or gate_up.shape[2] != width:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; allowed: [E, 2I, {width}]")
    allowed = [gate_up.shape[0], width, gate_up.shape[1] // 2]
    if list(down.shape) != allowed:
        raise ValueError(f"down has shape {list(down.shape)}; allowed: {allowed}")


def check_dtype(name: str, parameter: torch.Tensor, hidden: torch.Tensor) -> None:
    if parameter.dtype != hidden.dtype:
        raise ValueError(f"{name} is {parameter.dtype}; allowed: hidden's dtype, {hidden.dtype}")


@custom_op("deepseek_v3::expert_permutation")
def _permutation(indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import expert_permutation

    return expert_permutation(indices, num_experts)


@_permutation.register_fake
def _(indices, num_experts):
    order = indices.new_empty(indices.numel(), dtype=torch.int32)
    return order, indices.new_empty(indices.shape, dtype=torch.int32), order.new_empty(num_experts + 1)


@custom_op("deepseek_v3::grouped_swiglu_experts")
def _forward(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not uses_triton(hidden):
        output, projected = torch_impl.experts_forward(hidden, weights, gate_up, down, order, slots, offsets)
        return output, projected if keep else hidden.new_empty(0)
    from .triton_impl import experts_forward

    return experts_forward(hidden, weights, gate_up, down, order, slots, offsets), hidden.new_empty(0)


@_forward.register_fake
def _(hidden, weights, gate_up, down, order, slots, offsets, keep):
    return hidden.new_empty(hidden.shape), hidden.new_empty(0)  # nothing is kept while compiling


@custom_op("deepseek_v3::grouped_swiglu_experts_backward")
def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    projected: torch.Tensor,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not uses_triton(hidden):
        return torch_impl.experts_backward(
            grad, hidden, weights, gate_up, down, order, slots, offsets, projected, frozen
        )
    from .triton_impl import experts_backward

    return experts_backward(grad, hidden, weights, gate_up, down, order, slots, offsets, frozen)


@_backward.register_fake
def _(grad, hidden, weights, gate_up, down, order, slots, offsets, projected, frozen):
    shapes = [(0,), (0,)] if frozen else [gate_up.shape, down.shape]
    parameters = (x.new_empty(shape) for x, shape in zip((gate_up, down), shapes, strict=True))
    return hidden.new_empty(hidden.shape), weights.new_empty(weights.shape), *parameters


def _setup_context(ctx, inputs, output):
    *inputs, _ = inputs
    _, projected = output
    ctx.save_for_backward(*inputs, projected)
    ctx.mark_non_differentiable(projected)


def _autograd(ctx, grad, _):
    frozen = not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3])  # as the base weights are under LoRA
    grads = torch.ops.deepseek_v3.grouped_swiglu_experts_backward(grad.contiguous(), *ctx.saved_tensors, frozen)
    return *(grads[:2] if frozen else grads), *([None] * (6 if frozen else 4))


_forward.register_autograd(_autograd, setup_context=_setup_context)
