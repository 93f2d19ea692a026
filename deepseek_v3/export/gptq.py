"""INT4 weights better than those rounded to nearest: scales of least squared error, and GPTQ (arXiv 2210.17323).

GPTQ has the weights' inputs in view. They are known by their second moment `H = X^T X` `[K, K]`, since the squared
error of the output is `tr((W - Q) H (W - Q)^T)`. Q lies on the grid of `kernels.int4`: `code * scale` with codes -8..7
and one scale for each group of consecutive inputs.

Shape legend: N outputs, K inputs, G groups.
"""

import torch

from ..kernels.int4 import quantize_int4

DAMPING = 0.01  # of the mean diagonal of H, added to the diagonal
BLOCK = 128  # inputs whose corrections reach the inputs after them in one product
SHRINKAGE = torch.linspace(1.0, 0.5, 26).tolist()  # of max|w| / 7.5: the scales that are tried


def search_scales(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """For each group the scale, of `SHRINKAGE` below `max|w| / 7.5`, with the least squared error after rounding.

    `weight [..., N, K]` floating point -> `[..., N, G]` in the weight's dtype, to which the scales are rounded before
    they are compared.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    widest = groups.abs().amax(-1) / 7.5
    least = torch.full_like(widest, torch.inf)
    scale = torch.empty_like(widest, dtype=weight.dtype)
    for factor in SHRINKAGE:
        candidate = (widest * factor).to(weight.dtype)
        candidate = candidate.masked_fill(candidate == 0, torch.finfo(candidate.dtype).eps)  # as quantize_int4
        step = candidate.float()[..., None]
        error = round_to_grid(groups, step).mul_(step).sub_(groups).square_().sum(-1)
        scale = torch.where(error < least, candidate, scale)
        least = torch.minimum(least, error)
    return scale


def round_to_grid(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest codes -8..7, in floating point."""
    return (weight / scale).round_().clamp_(-8, 7)


def spread(scale: torch.Tensor, inputs: int) -> torch.Tensor:
    """`[..., G]` -> the scale of each input `[..., K]` fp32."""
    return scale.float().repeat_interleave(inputs // scale.shape[-1], dim=-1)


def damped(moment: torch.Tensor) -> torch.Tensor:
    """H with `DAMPING`, in fp64. Inputs that were always zero have that alone, and so take part in no correction."""
    moment = moment.double()
    damping = DAMPING * moment.diagonal().mean()
    return moment + torch.eye(len(moment), dtype=moment.dtype, device=moment.device) * (damping if damping else 1.0)


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Upper triangular `U [K, K]` fp64 with `U^T U = moment^-1`, for a positive definite `moment`."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)


class Gptq:
    """GPTQ for all weights whose inputs have the second moment `moment [K, K]`; one factorisation serves them.

    The scales are those of `quantize_int4`: with scales of least squared error, which clip the largest weights, the
    model's KL divergence measures higher. They come first, from the original weights. So the inputs can be rounded in
    any order, and are in that of falling power, while groups stay groups of consecutive inputs: no `g_idx` is needed.
    """

    def __init__(self, moment: torch.Tensor, group_size: int) -> None:
        moment = damped(moment)
        self._group_size = group_size
        self._order = moment.diagonal().argsort(descending=True, stable=True)
        self._factor = inverse_factor(moment[self._order][:, self._order]).float()

    def __call__(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight [N, K]` -> codes `[N, K]` fp32, scale `[N, G]` in the weight's dtype."""
        _, scale = quantize_int4(weight, self._group_size)
        columns = spread(scale, weight.shape[1])[:, self._order]
        codes = torch.empty_like(columns)
        codes[:, self._order] = round_in_turn(weight.float()[:, self._order], columns, self._factor)
        return codes, scale


def round_in_turn(weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Round one input after the other; those after it make up for its error as far as they can.

    `weight`, `scale` `[N, K]` fp32, `factor` of `inverse_factor` -> codes `[N, K]` fp32. `weight` is overwritten.
    """
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:stop])
        for k in range(start, stop):
            codes[:, k] = round_to_grid(weight[:, k], scale[:, k])
            errors[:, k - start] = (weight[:, k] - codes[:, k] * scale[:, k]) / factor[k, k]
            weight[:, k:stop] -= torch.outer(errors[:, k - start], factor[k, k:stop])
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes
