"""The optimizer of a recipe, and the learning-rate schedule."""

from collections.abc import Iterable

from torch import nn

from ..optimizer import MasterAdamW, warmup_cosine
from .recipe import Recipe


def build_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> MasterAdamW:
    """AdamW of the parameters that are trained. Matrices decay; norms and other vectors do not (paper 4.2)."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return MasterAdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over `warmup_steps`, then cosine to `min_lr_ratio` of the peak, reached after the last step."""
    return recipe.learning_rate * warmup_cosine(recipe.warmup_steps, recipe.steps, recipe.min_lr_ratio)(step)
