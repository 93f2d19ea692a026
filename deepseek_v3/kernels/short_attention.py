"""Attention over short sequences on a CPU: torch's forward, and a backward of few large products.

torch's fused backward multiplies every head of every sequence alone, which below some 200 positions costs more than it
saves: `benchmarks/short_attention.py`.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

MAX_LENGTH = 192  # of the keys; with more, torch's backward is as fast and needs less memory
MAX_SCORES = 2**24  # of all heads and sequences, which are held in fp32


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `short_attention` computes these: there is a gradient to compute, on a CPU, and little of it."""
    tensors = (query, key, value)
    if query.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return False
    length, total = query.shape[2], key.shape[2]
    if mask is None:
        masked = length == total
    else:
        masked = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[2:] == (length, total)
    small = total <= MAX_LENGTH and query.shape[:3].numel() * total <= MAX_SCORES
    return small and masked and all(x.dtype == query.dtype in (torch.float32, torch.bfloat16) for x in tensors)


def short_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`softmax(q k^T scale) v`: `query [B, H, S, d]`, `key [B, H, T, d]`, `value [B, H, T, v]` -> `[B, H, S, v]`.

    `mask`: bool, `[B or 1, H or 1, S, T]`, true where a query sees a key; None: causal, S = T. The gradients' scores
    and softmax are computed in fp32, the products with them in the tensors' dtype.
    """
    return _ShortAttention.apply(query, key, value, scale, mask)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        # torch has a fused kernel only for values as wide as the keys.
        wide = F.pad(value, (0, max(0, key.shape[-1] - value.shape[-1])))
        output = F.scaled_dot_product_attention(query, key, wide, mask, scale=scale, is_causal=mask is None)
        return output[..., : value.shape[-1]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        *tensors, mask = ctx.saved_tensors
        query, key, value, grad = (x.contiguous() for x in (*tensors, grad))  # each is read twice
        dtype = query.dtype
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)).mul_(ctx.scale)
        if mask is None:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        else:
            # Not -inf: what sees nothing is then uniform, and the second fill makes it zero.
            lowest = torch.finfo(scores.dtype).min
            weights = scores.masked_fill_(~mask, lowest).softmax(-1).masked_fill_(~mask, 0)
        grad_value = torch.matmul(weights.to(dtype).transpose(-1, -2), grad)
        grad_weights = torch.matmul(grad, value.transpose(-1, -2)).float()
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale).to(dtype)
        grad_key = torch.matmul(grad_scores.transpose(-1, -2), query)
        return torch.matmul(grad_scores, key), grad_key, grad_value, None, None
