"""RoPE at the shapes of V3 (128 heads) and Moonlight (16), forward in place and backward, beside torch."""

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.rope import reference, triton_impl

NOPE, ROPE = 128, 64


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    sizes = ((8, 2),) if small else ((8192, 128), (8192, 16), (128, 128))
    for tokens, heads in sizes:
        queries = torch.randn(1, tokens, heads, NOPE + ROPE, device=device, dtype=torch.bfloat16)
        key = torch.randn(1, tokens, 512 + ROPE, device=device, dtype=torch.bfloat16)[..., 512:]
        angles = torch.rand(1, tokens, ROPE // 2, device=device)
        inputs = queries, key, angles.cos().bfloat16(), angles.sin().bfloat16()
        shape, size = f"{tokens} tokens, {heads} heads, {NOPE}+{ROPE} bf16", 2 * tokens * (heads + 1) * ROPE
        yield Case(
            "rope forward",
            shape,
            {
                "ours": lambda x=inputs: triton_impl.rope_in_place(*x, True),
                "torch": lambda x=inputs: reference.rotate_queries_and_key(*x, True),
                "compile": lambda x=inputs: _compiled(*x, True),
            },
            bytes=2 * size,
            target=">= 80 % of the copy bandwidth on the rope columns",
            kernels=("rope",),
        )
        leaves = queries.clone().requires_grad_(), key.clone().requires_grad_()
        graph = reference.rotate_queries_and_key(*leaves, *inputs[2:], True)
        grads = torch.randn_like(queries), torch.randn_like(key)
        yield Case(
            "rope backward",
            shape,
            {
                "ours": lambda x=inputs, g=grads: triton_impl.rope(*g, *x[2:], True, True),
                "torch": lambda y=graph, x=leaves, g=grads: torch.autograd.grad(y, x, g, retain_graph=True),
            },
            bytes=2 * (size + 2 * tokens * heads * NOPE),
            target=">= 85 % of the copy bandwidth",
            kernels=("rope",),
        )


@torch.compile(dynamic=False)
def _compiled(queries, key, cos, sin, interleave):
    return reference.rotate_queries_and_key(queries, key, cos, sin, interleave)
