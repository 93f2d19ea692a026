"""Routed experts beside `torch._grouped_mm` on permuted rows, Liger where installed, and the loop over experts."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.experts import reference, triton_impl

try:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
except ImportError:
    LigerFusedMoEFunction = None

KERNELS = ("experts_gate_up", "experts_product")
BACKWARD_KERNELS = (*KERNELS, "experts_grad_activation", "experts_grad_parameter")


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    # experts, hidden, intermediate, chosen, tokens for training, tokens for decoding
    sizes = [
        (128, 2048, 768, 8, 32768, ()),
        (64, 7168, 2048, 8, 8192, (1, 16, 64)),
    ]  # V3: a quarter of its 256 experts
    for experts, hidden, intermediate, chosen, tokens, decoded in [(4, 64, 32, 2, 12, (1,))] if small else sizes:
        gate_up = torch.randn(experts, 2 * intermediate, hidden, device=device, dtype=torch.bfloat16) / hidden**0.5
        down = torch.randn(experts, hidden, intermediate, device=device, dtype=torch.bfloat16) / intermediate**0.5
        for count in (tokens, *decoded):
            x = torch.randn(count, hidden, device=device, dtype=torch.bfloat16)
            weights, indices = torch.rand(count, experts, device=device).topk(chosen, sorted=False)
            inputs = (x, indices, weights, gate_up, down)
            shape = f"{count}x{hidden}, {chosen} of {experts} experts of {intermediate}, bf16"
            flops = 6 * count * chosen * hidden * intermediate
            if count in decoded:
                runs = {"ours": _forward, "torch": _grouped_mm, "loop": reference.grouped_swiglu_experts}
                read = indices.unique().numel() * 3 * hidden * intermediate * 2
                yield _case("experts decode", shape, runs, inputs, KERNELS, bytes=read)
                continue
            runs = {"ours": _forward, "torch": _grouped_mm}
            leaves = [leaf.detach().requires_grad_() for leaf in (x, weights, gate_up, down)]
            peers = {"torch": _grouped_mm}
            if LigerFusedMoEFunction is not None:
                runs["liger"] = peers["liger"] = _liger
            target = "> 337 TFLOP/s (Liger)" if hidden == 2048 else ""
            yield _case("experts forward", shape, runs, inputs, KERNELS, flops=flops, target=target)
            grad, choices = torch.randn_like(x), triton_impl.expert_permutation(indices, experts)
            backward = {"ours": lambda g=grad, i=inputs, c=choices: _backward(g, *i, *c)}
            for name, peer in peers.items():
                y = peer(leaves[0], indices, *leaves[1:])
                backward[name] = lambda y=y, g=grad, i=leaves: torch.autograd.grad(y, i, g, retain_graph=True)
            target = "> 242 TFLOP/s (Liger)" if hidden == 2048 else ""
            yield Case("experts backward", shape, backward, 2 * flops, target=target, kernels=BACKWARD_KERNELS)


def _case(op, shape, runs, inputs, kernels, **fields) -> Case:
    return Case(op, shape, {name: lambda f=run: f(*inputs) for name, run in runs.items()}, kernels=kernels, **fields)


def _forward(hidden, indices, weights, gate_up, down):
    choices = triton_impl.expert_permutation(indices, gate_up.shape[0])
    return triton_impl.experts_forward(hidden, weights, gate_up, down, *choices)


def _backward(grad, hidden, indices, weights, gate_up, down, order, slots, offsets):
    return triton_impl.experts_backward(grad, hidden, weights, gate_up, down, order, slots, offsets, frozen=False)


def _grouped_mm(hidden, indices, weights, gate_up, down):
    order, slots, offsets = reference.permutation(indices, gate_up.shape[0])
    rows = hidden.index_select(0, order // indices.shape[1])
    gate, up = torch._grouped_mm(rows, gate_up.mT, offs=offsets[1:]).chunk(2, dim=-1)
    rows = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=offsets[1:])
    chosen = rows.index_select(0, slots.flatten()).view(*slots.shape, -1)
    return torch.bmm(weights.to(rows.dtype).unsqueeze(1), chosen).squeeze(1)


def _liger(hidden, indices, weights, gate_up, down):
    return LigerFusedMoEFunction.apply(hidden, gate_up, down, indices.int(), weights)
