"""Router kernels: one program per block of tokens, all experts of a token in registers, K times the best one left.

Scores are compared as integers in the same order, which a warp reduces in one instruction.
"""

import torch
import triton
import triton.language as tl

from ..configs import bucket, kernel_config

TAKEN = tl.constexpr(-(2**31))  # the key of what is not there or was taken: below that of every number


@triton.jit
def _key(x):
    """int32 in the order of the fp32 `x`; NaN is the largest, as in `torch.topk`."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _first_best(key, position, AXIS: tl.constexpr):
    """The lowest position of the largest key along the axis, which is kept."""
    best = tl.max(key, axis=AXIS, keep_dims=True)
    return tl.min(tl.where(key == best, position, 2**30), axis=AXIS, keep_dims=True)


@triton.jit
def _route_forward_kernel(
    logits_ptr,  # [tokens, EXPERTS] fp32, row stride logits_stride
    bias_ptr,  # [EXPERTS] fp32
    real_ptr,  # [tokens] bool; read if MASKED
    weights_ptr,  # [tokens, TOP_K] fp32
    indices_ptr,  # [tokens, TOP_K] int64
    counts_ptr,  # [EXPERTS] int64, zero
    tokens,
    logits_stride,
    scale,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # groups, and
    MEMBER_BLOCK: tl.constexpr,  # experts of a group, rounded up to powers of two
    CHOICE_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    MEMBERS: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    group = tl.arange(0, GROUP_BLOCK)[None, :]
    member = tl.arange(0, MEMBER_BLOCK)[None, None, :]
    expert = group[:, :, None] * MEMBERS + member
    exists = (group[:, :, None] < GROUPS) & (member < MEMBERS)
    at = token[:, :, None] * logits_stride + expert
    logits = tl.load(logits_ptr + at, mask=(token[:, :, None] < tokens) & exists, other=0.0)
    score = tl.sigmoid(logits) + tl.load(bias_ptr + expert, mask=exists, other=0.0)
    key = tl.where(exists, _key(score), TAKEN)
    if TOP_GROUPS < GROUPS:
        best = _first_best(key, member, 2)
        second = _first_best(tl.where(member == best, TAKEN, key), member, 2)
        group_score = tl.sum(tl.where((member == best) | (member == second), score, 0.0), axis=2)
        group_key = tl.where(group < GROUPS, _key(group_score), TAKEN)
        for _ in range(TOP_GROUPS):
            group_key = tl.where(group == _first_best(group_key, group, 1), TAKEN, group_key)
        key = tl.where(group_key[:, :, None] == TAKEN, key, TAKEN)  # only experts of the groups just taken

    key = tl.reshape(key, (TOKENS, GROUP_BLOCK * MEMBER_BLOCK))
    column = tl.arange(0, GROUP_BLOCK * MEMBER_BLOCK)[None, :]
    choice = tl.arange(0, CHOICE_BLOCK)[None, :]
    chosen = tl.zeros((TOKENS, CHOICE_BLOCK), tl.int32)
    for k in range(TOP_K):  # there are at least K experts to take, so these exist and are distinct
        best_column = _first_best(key, column, 1)
        chosen = tl.where(choice == k, best_column, chosen)
        key = tl.where(column == best_column, TAKEN, key)
    chosen = chosen // MEMBER_BLOCK * MEMBERS + chosen % MEMBER_BLOCK  # from a column to an expert

    mask = (token < tokens) & (choice < TOP_K)
    weight = tl.sigmoid(tl.load(logits_ptr + token * logits_stride + chosen, mask=mask, other=0.0))
    if NORMALIZE:
        weight /= tl.sum(tl.where(mask, weight, 0.0), axis=1, keep_dims=True) + 1e-20
    tl.store(weights_ptr + token * TOP_K + choice, weight * scale, mask=mask)
    tl.store(indices_ptr + token * TOP_K + choice, chosen.to(tl.int64), mask=mask)
    if MASKED:
        mask &= tl.load(real_ptr + token, mask=token < tokens, other=0) != 0
    tl.atomic_add(counts_ptr + chosen, tl.full((TOKENS, CHOICE_BLOCK), 1, tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _route_backward_kernel(
    grad_ptr,  # [tokens, TOP_K] fp32, of the weights
    logits_ptr,  # [tokens, EXPERTS] fp32, row stride logits_stride
    indices_ptr,  # [tokens, TOP_K] int64
    grad_logits_ptr,  # [tokens, EXPERTS] fp32
    tokens,
    logits_stride,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    CHOICE_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    choice = tl.arange(0, CHOICE_BLOCK)[None, :]
    mask = (token < tokens) & (choice < TOP_K)
    grad = tl.load(grad_ptr + token * TOP_K + choice, mask=mask, other=0.0) * scale
    chosen = tl.load(indices_ptr + token * TOP_K + choice, mask=mask, other=0)
    score = tl.sigmoid(tl.load(logits_ptr + token * logits_stride + chosen, mask=mask, other=0.0))
    if NORMALIZE:
        total = tl.sum(tl.where(mask, score, 0.0), axis=1, keep_dims=True) + 1e-20
        grad = (grad - tl.sum(grad * score, axis=1, keep_dims=True) / total) / total
    grad *= score * (1.0 - score)

    expert = tl.arange(0, EXPERT_BLOCK)[None, :]
    zeros = tl.zeros((TOKENS, EXPERT_BLOCK), tl.float32)
    tl.store(grad_logits_ptr + token * EXPERTS + expert, zeros, mask=(token < tokens) & (expert < EXPERTS))
    tl.debug_barrier()  # another thread may have written the zero that is now overwritten
    tl.store(grad_logits_ptr + token * EXPERTS + chosen, grad, mask=mask)


def route_forward(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    token_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> weights `[N, K]` fp32, experts `[N, K]` int64 (best biased score first), counts `[E]` int64."""
    tokens, experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_groups = 1 if top_groups == num_groups else num_groups
    group_block, member_block = (triton.next_power_of_2(x) for x in (num_groups, experts // num_groups))
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    counts = torch.zeros(experts, dtype=torch.int64, device=logits.device)
    sizes = {"tokens": bucket(tokens), "experts": group_block * member_block}
    config = kernel_config("route_forward", logits.device, **sizes)
    if tokens:
        _route_forward_kernel[(triton.cdiv(tokens, config["TOKENS"]),)](
            logits,
            bias.contiguous(),
            indices if token_mask is None else token_mask.contiguous(),
            weights,
            indices,
            counts,
            tokens,
            logits.stride(0),
            scale,
            EXPERTS=experts,
            GROUPS=num_groups,
            TOP_GROUPS=min(top_groups, num_groups),
            TOP_K=top_k,
            GROUP_BLOCK=group_block,
            MEMBER_BLOCK=member_block,
            CHOICE_BLOCK=triton.next_power_of_2(top_k),
            NORMALIZE=normalize,
            MASKED=token_mask is not None,
            **config,
        )
    return weights, indices, counts


def route_backward(
    grad: torch.Tensor, logits: torch.Tensor, indices: torch.Tensor, normalize: bool, scale: float
) -> torch.Tensor:
    """Gradient of the logits `[N, E]` from that of the weights `[N, K]`, fp32; zero for experts not chosen."""
    tokens, experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    grad_logits = torch.empty(tokens, experts, dtype=torch.float32, device=logits.device)
    config = kernel_config("route_backward", logits.device, tokens=bucket(tokens), experts=experts)
    if tokens:
        _route_backward_kernel[(triton.cdiv(tokens, config["TOKENS"]),)](
            grad.contiguous(),
            logits,
            indices,
            grad_logits,
            tokens,
            logits.stride(0),
            scale,
            EXPERTS=experts,
            TOP_K=indices.shape[1],
            EXPERT_BLOCK=triton.next_power_of_2(experts),
            CHOICE_BLOCK=triton.next_power_of_2(indices.shape[1]),
            NORMALIZE=normalize,
            **config,
        )
    return grad_logits
