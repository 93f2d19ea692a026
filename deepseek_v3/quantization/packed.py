"""A layer's routed experts in NF4 (arXiv 2305.14314): what bitsandbytes makes of a matrix, for a stack of matrices.

Shape legend: E experts, n of them, M = out * in elements of one expert's matrix, S = ceil(M / 64) blocks of it.
"""

import torch
from bitsandbytes import functional
from torch import nn

BLOCK = 64  # elements that share a scale
NESTED_BLOCK = 256  # scales that share a scale of their own, with double quantization
_MAX_ELEMENTS = 2**30  # of a call: bitsandbytes' CUDA kernels count in int32


def decode_scales(
    absmax: torch.Tensor, nested_absmax: torch.Tensor, nested_code: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Undo double quantization: `[n, S]` uint8, `[n, ceil(S / 256)]`, `[256]`, `[n]` -> `[n, S]` fp32."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK, dim=1)[:, : absmax.shape[1]]
    return (nested_code[absmax.int()] * scales).add_(offset[:, None])


def decode(packed: torch.Tensor, absmax: torch.Tensor, matrix: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """`packed [n, ceil(M / 2)]` uint8, `absmax [n, S]` fp32 -> `[n, *matrix]`, code times scale rounded to `dtype`.

    bitsandbytes sees one row without end, never the matrix: on CPUs with AVX512 its blocks begin anew in every row, so
    that a width which is no multiple of 64 would get wrong scales (0.50.2).
    """
    elements = matrix.numel()
    step = max(1, _MAX_ELEMENTS // elements) if elements % BLOCK == 0 else 1  # a call begins with a whole block
    output = torch.empty(len(packed), *matrix, dtype=dtype, device=packed.device)
    for packed_, absmax_, output_ in zip(packed.split(step), absmax.split(step), output.split(step), strict=True):
        row = torch.Size((2 * packed_.numel(),))
        state = functional.QuantState(
            absmax_.flatten(), shape=row, code=None, blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        piece = functional.dequantize_4bit(packed_.reshape(-1, 1), state)
        output_.view(len(packed_), -1).copy_(piece.view(len(packed_), -1)[:, :elements])
    return output


class NF4Weight(nn.Module):
    """A frozen weight `[E, out, in]` in 4 bits, under the name and in the place of the parameter it was made from.

    Each expert's matrix is quantized on its own, so that its part of every tensor is bit for bit what
    `bitsandbytes.functional.quantize_4bit` returns for it. A module rather than a tensor: its parts move, copy and
    pickle with the model and are ordinary entries of its state dict. They follow the model to another device but never
    to another dtype.

    `dtype` is that of the weight it was made from. `packed [E, ceil(M / 2)]` uint8; `absmax [E, S]` fp32. With double
    quantization `absmax` is uint8, and `nested_absmax [E, ceil(S / 256)]`, `nested_code [256]` and `offset [E]`, all
    fp32, decode it.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, parts: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype
        # Parameters: DDP would send buffers anew at every step.
        for name in ("packed", "absmax", "nested_absmax", "nested_code", "offset"):
            part = parts.get(name)
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: torch.Tensor, double_quant: bool = True) -> "NF4Weight":
        """`weight [E, out, in]`, bf16, fp16 or fp32, is read one expert at a time, on the device it is on."""
        experts = [
            functional.quantize_4bit(matrix, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4")
            for matrix in weight.detach().unbind()
        ]
        parts = {
            "packed": torch.stack([packed.flatten() for packed, _ in experts]),
            "absmax": torch.stack([state.absmax for _, state in experts]),
        }
        if double_quant:
            states = [state for _, state in experts]
            parts["nested_absmax"] = torch.stack([state.state2.absmax for state in states])
            parts["nested_code"] = states[0].state2.code.clone()  # bitsandbytes has one for the whole process
            parts["offset"] = torch.stack([state.offset for state in states])
        return cls(weight.shape, weight.dtype, parts)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None, experts: torch.Tensor | None = None) -> torch.Tensor:
        """-> `[E, out, in]` newly made, or `[n, out, in]` of the chosen `experts [n]` int64; `dtype` defaults to own.

        Each value is the fp32 product of its code and scale, rounded once.
        """
        chosen = slice(None) if experts is None else experts
        absmax = self.absmax[chosen]
        if self.nested_absmax is not None:
            absmax = decode_scales(absmax, self.nested_absmax[chosen], self.nested_code, self.offset[chosen])
        return decode(self.packed[chosen], absmax, self.shape[1:], dtype or self.dtype)

    def __getitem__(self, expert: int) -> torch.Tensor:
        """One expert's matrix `[out, in]` in `dtype`."""
        return self.dequantize(experts=torch.tensor([expert], device=self.device)).squeeze(0)

    def _apply(self, fn, recurse=True):
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}, double_quant={self.nested_absmax is not None}"
