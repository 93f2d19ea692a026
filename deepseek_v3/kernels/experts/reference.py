"""The routed experts in plain torch, one expert after the other, and the sort of their choices."""

import torch
import torch.nn.functional as F


def permutation(indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    experts = torch.arange(num_experts + 1, device=flat.device)
    offsets = torch.searchsorted(flat[order], experts, out_int32=True)
    return order.to(torch.int32), slots.view_as(indices).to(torch.int32), offsets


def grouped_swiglu_experts(
    hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Sums over a token's choices in fp32 (fp64 if an input is)."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weights.dtype), torch.float32)
    output = hidden.new_zeros(hidden.shape, dtype=dtype)
    for expert, (gate_up_e, down_e) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, position = torch.where(indices == expert)
        gate, up = F.linear(hidden[token], gate_up_e).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down_e)
        output.index_add_(0, token, rows.to(dtype) * weights[token, position, None].to(dtype))
    return output.to(hidden.dtype)
