"""Weights that stay in memory as the file holds them, and linear layers made of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layouts import Layout, Matrix, Parts

# the parts of an experts' weight, in the order in which their rows follow each other
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class PackedWeight(nn.Module):
    """A frozen weight in one of the formats of `layouts`, in the place of a parameter.

    It stands for `[out, in]`, or for the experts' `[E, out, in]`, where an expert's rows are those of its P
    projections (gate and up, or down), which are packed each for itself: the parts are `[E, P, ...]`. A module rather
    than a tensor: the parts move, copy and pickle with the model (those in FP8 with `torch.save`: torch cannot read
    back Python's own pickles of float8). They follow it to another device, never to another dtype.

    `dtype`: what the weight is dequantized to, and what its products are computed in.
    """

    def __init__(self, layout: Layout, matrix: Matrix, dtype: torch.dtype, lead: tuple[int, ...] = ()) -> None:
        """On the meta device; `lead` is `(E, P)` for experts."""
        super().__init__()
        self.layout, self.matrix, self.dtype, self.lead = layout, matrix, dtype, lead
        self.shape = torch.Size((lead[0], lead[1] * matrix[0], matrix[1]) if lead else matrix)
        for name, (part_dtype, shape) in layout.parts(matrix).items():
            part = torch.empty((*lead, *shape), dtype=part_dtype, device="meta")
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self._cache: dict = {}
        self._is_hf_initialized = True  # or transformers would draw random weights for it

    @property
    def parts(self) -> Parts:
        if self.device.type == "meta":
            raise ValueError("a packed weight holds no numbers: it was offloaded, which only plain weights can be")
        return dict(self._parameters)

    @property
    def data(self) -> torch.Tensor:
        """What PEFT would merge an adapter into."""
        raise ValueError("a packed weight is frozen: merge an adapter into the dequantized model instead")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None, experts: torch.Tensor | None = None) -> torch.Tensor:
        """-> the whole weight, newly made, or `[n, out, in]` of the chosen `experts [n]` int64; `dtype` defaults to
        own. Each value is the product of its code and scale, rounded once."""
        parts = self.parts if experts is None else {name: part[experts] for name, part in self.parts.items()}
        matrices = {name: part.flatten(0, 1) if self.lead else part[None] for name, part in parts.items()}
        weight = self.layout.dequantize(matrices, self.matrix, dtype or self.dtype)
        return weight.view(-1, *self.shape[-2:]) if self.lead else weight.squeeze(0)

    def __getitem__(self, expert: int) -> torch.Tensor:
        """One expert's matrix `[out, in]` in `dtype`."""
        return self.dequantize(experts=torch.tensor([expert], device=self.device)).squeeze(0)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., in] -> [..., out]` in x's dtype, differentiable in x. Not for experts."""
        rows = x.reshape(-1, x.shape[-1])
        product = self.layout.linear(rows, self.parts, self.matrix, self._cache)
        if product is None:
            product = DequantizedProduct.apply(rows, self)
        return product.view(*x.shape[:-1], self.matrix[0])

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """The file's tensors for this weight of a linear layer `name`, or of experts under "....gate_up_proj"."""
        if not self.lead:
            return {f"{name}{suffix}": part for suffix, part in self.layout.write(self.parts, self.matrix).items()}
        experts, _, weight = name.rpartition(".")
        found: dict[str, torch.Tensor] = {}
        for expert in range(self.lead[0]):
            for number, projection in enumerate(PROJECTIONS[weight]):
                parts = {part: tensor[expert, number] for part, tensor in self.parts.items()}
                tensors = self.layout.write(parts, self.matrix)
                found |= {f"{experts}.{expert}.{projection}{suffix}": part for suffix, part in tensors.items()}
        return found

    def _apply(self, fn, recurse=True):
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        self._cache.clear()
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}, {self.layout}"


class GroupedPackedWeight(PackedWeight):
    """Experts with a product of their packed weights."""

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """`x [M, in]` sorted by expert -> `[M, out]`; expert e has the rows from `offsets[e]` to `offsets[e + 1]`
        (int32 `[E + 1]`)."""
        return self.layout.grouped_linear(x, self.parts, offsets, self._cache)


class DequantizedProduct(torch.autograd.Function):
    """`x W^T` with a weight that is dequantized in forward and anew in backward.

    `weight`: whatever has `dequantize(dtype) -> [out, in]`, a packed weight or a layer around one.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.matmul(grad, ctx.weight.dequantize(grad.dtype)), None


class PackedLinear(nn.Linear):
    """A linear layer around a packed weight, in the place of `source`, whose bias it takes."""

    def __init__(self, source: nn.Linear, weight: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight: PackedWeight
        self.weight, self.bias = weight, source.bias
        self.source_cls = type(source)
        self.train(source.training)
        self._is_hf_initialized = True

    @property
    def compute_dtype(self) -> torch.dtype:
        """PEFT's name of the dtype that adapters get."""
        return self.weight.dtype

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[out, in]`, newly made."""
        return self.weight.dequantize(dtype)

    def plain_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """`dequantize`, once: for the projection that the attention multiplies by in every step of decoding."""
        cache = self.weight._cache
        if dtype not in cache:
            cache[dtype] = self.dequantize(dtype)
        return cache[dtype]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.weight.linear(input.to(self.weight.dtype))
        return (output if self.bias is None else output + self.bias).to(input.dtype)
