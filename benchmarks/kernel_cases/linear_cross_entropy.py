"""Linear cross-entropy, forward and backward together, at the heads of V3 and Moonlight."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import Case
from deepseek_v3.kernels.dispatch import kernels
from deepseek_v3.kernels.linear_cross_entropy import linear_cross_entropy, reference

try:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger
except ImportError:
    Liger = None

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _with_backward(loss: Callable[..., torch.Tensor], tensors: Tensors) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(*tensors), tensors[:2])


def _ours(*tensors: torch.Tensor) -> torch.Tensor:
    with kernels("triton"):
        return linear_cross_entropy(*tensors)[0]


def _chunked(*tensors: torch.Tensor) -> torch.Tensor:
    return reference._LinearCrossEntropy.apply(*tensors, 2048)[0]


def _all_logits(hidden, weight, labels, row_weights) -> torch.Tensor:
    return (F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none") * row_weights).sum()


def _liger(hidden, weight, labels, row_weights) -> torch.Tensor:
    return Liger.apply(hidden, weight, labels)[0]  # the mean: no row weights


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    heads = {"tiny": (8, 16, 40)} if small else {"V3": (8192, 7168, 129280), "Moonlight": (8192, 2048, 163840)}
    for name, (rows, hidden_size, vocab) in heads.items():
        hidden = torch.randn(rows, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(vocab, hidden_size, device=device, dtype=torch.bfloat16).mul_(hidden_size**-0.5)
        labels = torch.randint(vocab, (rows,), device=device)
        row_weights = torch.full((rows,), 1 / rows, device=device)
        tensors = hidden, weight.requires_grad_(), labels, row_weights
        peers = {"torch, chunked": _chunked, "torch, all logits": _all_logits} | ({"Liger": _liger} if Liger else {})
        yield Case(
            "linear_cross_entropy forward + backward",
            f"{name} {rows}x{hidden_size}x{vocab} bf16",
            {"ours": _with_backward(_ours, tensors)} | {k: _with_backward(f, tensors) for k, f in peers.items()},
            flops=6 * rows * hidden_size * vocab,
            target=">= 500 TFLOP/s on an H100",
            kernels=("cross_entropy", "cross_entropy_scale"),
        )
