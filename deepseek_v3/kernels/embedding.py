"""Looking up rows of a table: torch's, except that on a CPU the gradient of a bf16 table is summed in fp32."""

import torch
import torch.nn.functional as F


def embedding(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """`weight[ids]`: `ids [...]` int, `weight [V, H]` -> `[..., H]`, differentiable; `padding_idx` gets no gradient.

    On a CPU torch adds a token's occurrences one by one in the weight's dtype: over 32,768 tokens of text a bf16
    gradient keeps two thirds of its norm. On a GPU it adds in fp32.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.requires_grad:
        return _Lookup.apply(ids, weight, padding_idx)
    return F.embedding(ids, weight, padding_idx)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx = weight.shape, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape, dtype=torch.float32)
        total.index_add_(0, ids.flatten(), grad.reshape(-1, ctx.shape[1]).float())
        if ctx.padding_idx is not None:
            total[ctx.padding_idx] = 0
        return None, total.to(grad.dtype), None
