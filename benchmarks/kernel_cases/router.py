"""The router at V3's numbers (8 of 256 experts, 4 of 8 groups) and Moonlight's (6 of 64), beside torch."""

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.router import reference, triton_impl


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    models = {"V3": (256, 8, 8, 4), "Moonlight": (64, 6, 1, 1)}
    for tokens in (2,) if small else (1, 128, 8192):
        for model, (experts, top_k, groups, top_groups) in models.items():
            logits = torch.randn(tokens, experts, device=device)
            bias = torch.zeros(experts, device=device)
            inputs = logits, bias, top_k, groups, top_groups, True, 2.5, None
            shape = f"{model}, {tokens} tokens"
            size = 4 * tokens * experts
            yield Case(
                "route forward",
                shape,
                {
                    "ours": lambda x=inputs: triton_impl.route_forward(*x),
                    "torch": lambda x=inputs: reference.route(*x),
                    "compile": lambda x=inputs: _compiled(*x),
                },
                bytes=size + tokens * top_k * (4 + 8),
                target="<= 5 us" if tokens <= 128 else "",
                kernels=("route_forward",),
            )
            weights, indices, _ = triton_impl.route_forward(*inputs)
            leaf = logits.clone().requires_grad_()
            graph, grad = reference.route(leaf, *inputs[1:])[0], torch.randn_like(weights)
            yield Case(
                "route backward",
                shape,
                {
                    "ours": lambda x=logits, i=indices, g=grad: triton_impl.route_backward(g, x, i, True, 2.5),
                    "torch": lambda y=graph, x=leaf, g=grad: torch.autograd.grad(y, x, g, retain_graph=True),
                },
                bytes=size + tokens * top_k * (4 + 8 + 4),
                kernels=("route_backward",),
            )


@torch.compile(dynamic=False)
def _compiled(logits, bias, top_k, num_groups, top_groups, normalize, scale, token_mask):
    return reference.route(logits, bias, top_k, num_groups, top_groups, normalize, scale, token_mask)
