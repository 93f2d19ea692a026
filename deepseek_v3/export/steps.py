"""An export as a list of steps: what is read together and written together, known before a byte is read."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from ..modeling_deepseek_v3.weight_files import DTYPE_BYTES
from .stored import DTYPES

if TYPE_CHECKING:
    from .source import Source

ROUTING_BIAS = ".e_score_correction_bias"
# Linear layers within a decoder layer, by official name; the router, eh_proj, lm_head and score are none of them.
LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.((shared_experts|experts\.\d+)\.)?(gate_proj|up_proj|down_proj))\.weight"
)
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Output:
    """A tensor to write. `dtype` is safetensors' name of it: "BF16", "F8_E4M3", "I32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Step:
    """What is read together and written together: one at a time is in memory.

    Attributes:
        inputs: official tensors that this step consumes. Over all steps of an export each is consumed once.
        outputs: what it writes, all into one file, in this order.
        run: gets `Source.read` and yields the tensors of `outputs`, on the CPU.
        quantized: whether the inputs count as quantized in the report.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    run: Callable[[Read], Iterable[torch.Tensor]]
    quantized: bool = False


def copy_step(name: str, source: "Source", dtype: str = "BF16") -> Step:
    """Write a tensor as it is, in `dtype`; the routing bias always in fp32.

    Embedding and head are written once more for each MTP layer, as official checkpoints have them.
    """
    dtype = "F32" if name.endswith(ROUTING_BIAS) else dtype
    copies = [copy for copy, original in source.copies.items() if original == name]
    outputs = tuple(Output(written, dtype, source.shape(name)) for written in (name, *copies))

    def run(read: Read) -> Iterable[torch.Tensor]:
        tensor = cast(read(name), DTYPES[dtype], name)
        yield from (tensor for _ in outputs)

    return Step((name,), outputs, run)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in `dtype`; `ValueError` if a number is too large for it."""
    result = tensor.to(dtype)
    if result.dtype != tensor.dtype and not result.isfinite().all() and tensor.isfinite().all():
        raise ValueError(
            f"{name}: found {tensor.abs().max().item():.3g}, too large for {dtype}; allowed is bf16 or fp32"
        )
    return result
