"""What GPTQ leaves of the error, reduced by gradient descent: a short reconstruction of each linear layer's output.

The scales, and roundings up to one code away from GPTQ's, are learned so that the layer's output on the calibration
text is the original's. The loss is that output's squared error, `tr((W - Q) H (W - Q)^T)`, for which the second
moment H of the inputs says everything about them. Gradients pass the rounding unchanged.

Shape legend: N outputs, K inputs, G groups.
"""

import torch

from .gptq import Gptq, spread

STEPS = 200
CODE_RATE = 0.02  # Adam's step for codes, in codes; it falls linearly to 0
SCALE_RATE = 0.002  # and for scales, as a fraction of each


class LearnedScales:
    """GPTQ followed by the reconstruction, for all weights whose inputs have the second moment `moment [K, K]`."""

    def __init__(self, moment: torch.Tensor, group_size: int) -> None:
        self._gptq = Gptq(moment, group_size)
        self._moment = moment.float() / moment.float().diagonal().mean()

    def __call__(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight [N, K]` -> codes `[N, K]` fp32, scale `[N, G]` in the weight's dtype."""
        return reconstruct(weight, *self._gptq(weight), self._moment)


def reconstruct(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight`, `codes` `[N, K]`, `scale [N, G]`, `moment [K, K]` -> codes `[N, K]` fp32 and scale `[N, G]` in its own
    dtype: for each output those of the step with the least error, so that none is worse than it was."""
    weight, start = weight.float(), scale.float()
    shift, factor = torch.zeros_like(codes), torch.ones_like(start)
    parameters = [{"params": [shift], "lr": CODE_RATE}, {"params": [factor], "lr": SCALE_RATE}]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    least = torch.full_like(weight[:, 0], torch.inf)
    best_codes, best_scale = codes, scale
    with torch.enable_grad():
        shift.requires_grad_(), factor.requires_grad_()
        for _ in range(STEPS + 1):
            trial_scale = _through((start * factor).to(scale.dtype).float(), start * factor)
            trial_codes = _through((codes + shift).round().clamp(-8, 7), codes + shift)
            difference = trial_codes * spread(trial_scale, weight.shape[1]) - weight
            errors = ((difference @ moment) * difference).sum(-1)
            better = errors.detach() < least
            least = torch.where(better, errors.detach(), least)
            best_codes = torch.where(better[:, None], trial_codes.detach(), best_codes)
            best_scale = torch.where(better[:, None], trial_scale.detach().to(scale.dtype), best_scale)
            shift.grad, factor.grad = torch.autograd.grad(errors.sum(), (shift, factor))
            optimizer.step()
            schedule.step()
    return best_codes, best_scale


def _through(value: torch.Tensor, differentiable: torch.Tensor) -> torch.Tensor:
    """`value` exactly, with the gradient of `differentiable`."""
    return value.detach() + (differentiable - differentiable.detach())
