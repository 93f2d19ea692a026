"""MLA attention of training at the heads of V3 (128) and Moonlight (16), causal, beside SDPA with expanded keys."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.mla_attention import triton_impl

NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    models = {"tiny": (1, 2, (48,))} if small else {"V3": (1, 128, (4096, 8192)), "Moonlight": (4, 16, (4096, 8192))}
    for name, batch, heads, length in [(n, b, h, s) for n, (b, h, lengths) in models.items() for s in lengths]:

        def random(*shape, batch=batch, length=length):
            return torch.randn(batch, length, *shape, device=device, dtype=torch.bfloat16)

        query, key_rope, grad = random(heads, NOPE + ROPE), random(ROPE), random(heads, VALUE)
        key_nope, value = random(heads, NOPE + VALUE).split([NOPE, VALUE], dim=-1)
        inputs = query, key_nope, key_rope, value
        key = torch.cat((key_nope, key_rope.unsqueeze(2).expand(-1, -1, heads, -1)), dim=-1)
        expanded = tuple(x.transpose(1, 2) for x in (query, key, value))
        padded = *expanded[:2], F.pad(expanded[2], (0, ROPE))  # FlashAttention-2 has one width for keys and values
        peers = {
            "SDPA cuDNN": (SDPBackend.CUDNN_ATTENTION, expanded),
            "SDPA flash, v padded": (SDPBackend.FLASH_ATTENTION, padded),
        }
        if device.type != "cuda":
            peers = {"SDPA": (SDPBackend.MATH, expanded)}
        flops = batch * heads * length**2 * (NOPE + ROPE + VALUE)  # half of the scores are masked
        yield Case(
            "mla_attention forward",
            f"{name} {batch}x{length}, {heads} heads bf16",
            {
                "ours": lambda x=inputs: triton_impl.mla_attention_forward(*x, SCALE, None),
                **{peer: lambda a=arguments: _sdpa(*a) for peer, arguments in peers.items()},
            },
            flops=flops,
            target=">= 450 TFLOP/s on an H100",
            kernels=("mla_attention_forward",),
        )
        saved = triton_impl.mla_attention_forward(*inputs, SCALE, None)
        yield Case(
            "mla_attention backward",
            f"{name} {batch}x{length}, {heads} heads bf16",
            {
                "ours": lambda x=inputs, g=grad, s=saved: triton_impl.mla_attention_backward(g, *x, *s, SCALE, None),
                **{peer: _sdpa_backward(*arguments, grad) for peer, arguments in peers.items()},
            },
            flops=2.5 * flops,
            target=">= 300 TFLOP/s on an H100",
            kernels=("mla_attention_backward_query", "mla_attention_backward_key_value"),
        )


def _sdpa(backend: SDPBackend, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*inputs, is_causal=True, scale=SCALE)


def _sdpa_backward(
    backend: SDPBackend, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The backward pass alone: the first call builds the graph."""
    kept: list[Any] = []

    def run() -> tuple[torch.Tensor, ...]:
        if not kept:
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = _sdpa(backend, tuple(leaves))
            kept.extend((output, leaves, F.pad(grad.transpose(1, 2), (0, output.shape[-1] - VALUE))))
        return torch.autograd.grad(*kept, retain_graph=True)

    return run
