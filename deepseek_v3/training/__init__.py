"""Pretraining: the recipe, the loop, load balancing, resumable states, evaluation."""

from .balance import LoadStatistics, RoutingBiasHook, load_counts, update_routing_bias
from .pretrain import pretrain
from .recipe import QUICKSTART, Recipe

__all__ = [
    "QUICKSTART",
    "LoadStatistics",
    "Recipe",
    "RoutingBiasHook",
    "load_counts",
    "pretrain",
    "update_routing_bias",
]
