"""The three training losses (paper 2.1.2, 2.2): cross-entropy, multi-token prediction, sequence-wise balance."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels.linear_cross_entropy import linear_cross_entropy as fused_linear_cross_entropy
from ..kernels.linear_cross_entropy.reference import rows_per_chunk
from .layers import DeepseekV3Linear

IGNORE_INDEX = -100


def _is_matrix(head: nn.Module) -> bool:
    """Whether calling `head` multiplies by its weight and does nothing else (accelerate replaces `forward`)."""
    plain = type(head) in (nn.Linear, DeepseekV3Linear) and type(head.weight) is nn.Parameter
    if not plain or head.bias is not None:
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(head)


def linear_cross_entropy(
    hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, row_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of `head(hidden)` without ever holding the logits of all rows.

    `hidden [N, H]`, `labels [N]` int64 in `[0, V)`, `row_weights [N]` fp32 -> the differentiable sum of
    `row_weights * nll` and the detached `nll [N]`, in nats, fp32. A head that is not a plain `nn.Linear` (adapter,
    quantized, sharded, hooked) is called as a module, chunk by chunk, its logits recomputed in backward.
    """
    row_weights = row_weights.float()
    if _is_matrix(head):
        weight = head.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return fused_linear_cross_entropy(hidden, weight, labels, row_weights)

    def chunk_losses(hidden_, labels_):
        return F.cross_entropy(head(hidden_).float(), labels_, reduction="none")

    chunk_rows = rows_per_chunk(head.out_features)
    chunks = zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True)
    losses = [checkpoint(chunk_losses, h, y, use_reentrant=False) for h, y in chunks]
    nll = torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
    return (nll * row_weights).sum(), nll.detach()


def shift_left(x: torch.Tensor, steps: int, fill: int | float) -> torch.Tensor:
    """`y[:, i] = x[:, i + steps]`, with `fill` where that is past the end. `x [B, S, ...]`."""
    shifted = torch.full_like(x, fill)
    if steps < x.shape[1]:
        shifted[:, : x.shape[1] - steps] = x[:, steps:]
    return shifted


def sequence_balance_loss(
    router_logits: torch.Tensor, top_k: int, token_mask: torch.Tensor | None, batch_size: int
) -> torch.Tensor:
    """Sequence-wise balance loss of one MoE layer without its coefficient (eq. 17-20), fp32 scalar.

    Per sequence `sum_i f_i P_i`, where `f_i` is E/(K T) times how often expert i is among the K highest *unbiased*
    scores and `P_i` the mean of the scores normalised to one per token; sequences are weighted by their real tokens.
    `router_logits [B*S, E]`, `token_mask [B, S]` or None.
    """
    num_experts = router_logits.shape[-1]
    scores = router_logits.sigmoid().view(batch_size, -1, num_experts)
    mask = scores.new_ones(scores.shape[:2]) if token_mask is None else token_mask.to(scores.dtype)
    tokens = mask.sum(dim=1)
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, dim=-1)[1], 1.0)
    weight = mask[..., None] / tokens.clamp(min=1)[:, None, None]
    fraction = (chosen * weight).sum(dim=1) * (num_experts / top_k)
    probability = (scores / scores.sum(dim=-1, keepdim=True) * weight).sum(dim=1)
    per_sequence = (fraction * probability).sum(dim=-1)
    return (per_sequence * tokens).sum() / tokens.sum().clamp(min=1)
