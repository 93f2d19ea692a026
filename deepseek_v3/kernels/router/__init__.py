"""The router of DeepSeekMoE: which experts a token goes to, with which weights, and how often each was chosen."""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group-limited top-k of `sigmoid(logits) + bias`, weighted by the scores without the bias (paper eq. 13-16).

    The experts are `num_groups` equal groups in a row. A group's score is the sum of its two best biased scores; the
    `top_k` best biased scores of the `top_groups` best groups are chosen. With `s_k = sigmoid(logit_k)` of the chosen,
    the weights are `scale * s_k`, if `normalize` divided by `sum(s) + 1e-20`.

    `logits [N, E]` and `bias [E]` fp32 (both fp64: plain torch), `token_mask [N]` bool, true for real tokens (all of
    them if None) -> weights `[N, K]` fp32, experts `[N, K]` int64, and `[E]` int64, how often real tokens chose each
    expert. Gradients flow from the weights to the logits only.

    The order of a token's K experts is not defined: best first in the Triton kernel, which also gives ties to the
    lowest expert. A NaN counts as the best score, as in `torch.topk`, and shows up in the weights.

    Raises ValueError for arguments that do not fit.
    """
    _check(logits, bias, top_k, num_groups, top_groups, token_mask)
    if not uses_triton(logits):
        return reference.route(logits, bias, top_k, num_groups, top_groups, normalize, scale, token_mask)
    return torch.ops.deepseek_v3.route(logits, bias, top_k, num_groups, top_groups, normalize, scale, token_mask)


def _check(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    token_mask: torch.Tensor | None,
) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits: found {tuple(logits.shape)} {logits.dtype}; allowed: [N, E] in fp32 or fp64")
    tokens, experts = logits.shape
    if bias.shape != (experts,) or bias.dtype != logits.dtype:
        raise ValueError(f"bias: found {tuple(bias.shape)} {bias.dtype}; allowed: [{experts}] in {logits.dtype}")
    if num_groups != 1 and (num_groups < 1 or experts % num_groups or experts < 2 * num_groups):
        allowed = f"1, or a divisor of E = {experts} that leaves two experts per group"
        raise ValueError(f"num_groups: found {num_groups}; allowed: {allowed}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups: found {top_groups}; allowed: 1 to num_groups = {num_groups}")
    if not 1 <= top_k <= top_groups * (experts // num_groups):
        allowed = f"1 to the {top_groups * (experts // num_groups)} experts of {top_groups} groups"
        raise ValueError(f"top_k: found {top_k}; allowed: {allowed}")
    if token_mask is not None and (token_mask.shape != (tokens,) or token_mask.dtype != torch.bool):
        found = f"{tuple(token_mask.shape)} {token_mask.dtype}"
        raise ValueError(f"token_mask: found {found}; allowed: [{tokens}] in torch.bool")


@custom_op("deepseek_v3::route")
def _forward(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    token_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .triton_impl import route_forward

    return route_forward(logits, bias, top_k, num_groups, top_groups, normalize, scale, token_mask)


@_forward.register_fake
def _(logits, bias, top_k, num_groups, top_groups, normalize, scale, token_mask):
    tokens, experts = logits.shape
    indices = logits.new_empty(tokens, top_k, dtype=torch.int64)
    return logits.new_empty(tokens, top_k), indices, logits.new_empty(experts, dtype=torch.int64)


@custom_op("deepseek_v3::route_backward")
def _backward(
    grad: torch.Tensor, logits: torch.Tensor, indices: torch.Tensor, normalize: bool, scale: float
) -> torch.Tensor:
    from .triton_impl import route_backward

    return route_backward(grad, logits, indices, normalize, scale)


@_backward.register_fake
def _(grad, logits, indices, normalize, scale):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, _, _, _, _, ctx.normalize, ctx.scale, _ = inputs
    _, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(logits, indices)


def _autograd(ctx, grad, *_):
    logits, indices = ctx.saved_tensors
    return torch.ops.deepseek_v3.route_backward(grad, logits, indices, ctx.normalize, ctx.scale), *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)
