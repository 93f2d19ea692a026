"""Continuous batching (`model.generate_batch`, `transformers serve --continuous-batching`) on the compressed latents.

transformers' paged cache holds, per token and layer, `head_dim` numbers for the key and as many for the value of each
key-value head, and reads both sizes from the configuration. Latent attention needs the `c + r` numbers of the latent
and the rotary key, once. They are stored as one key-value head whose "key" is their first half and whose "value" is
the second: nothing is stored twice, and the pages, prefix sharing and forking of transformers work unchanged.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ..configuration import DeepseekV3Config

__all__ = ["LatentBatchingMixin", "PagedAttentionCache", "update_paged_cache"]


class _PagedView:
    """A configuration as the paged cache has to see it: the sizes of what is cached, everything else as it is."""

    num_key_value_heads = 1

    def __init__(self, config: DeepseekV3Config) -> None:
        self._config = config

    @property
    def head_dim(self) -> int:
        return -(-(self._config.kv_lora_rank + self._config.qk_rope_head_dim) // 2)

    def get_text_config(self, *args: Any, **kwargs: Any) -> "_PagedView":
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def update_paged_cache(
    cache: PagedAttentionCache, latent: torch.Tensor, key_rope: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store latents `[1, 1, S, c]` and rotary keys `[1, 1, S, r]` of the batch's tokens, return all that it reads.

    The result is `[1, 1, T, c]` and `[1, 1, T, r]`. `kwargs` are the forward's paging arguments, changed in place.
    """
    ranks = [latent.shape[-1], key_rope.shape[-1]]
    joined = F.pad(torch.cat((latent, key_rope), dim=-1), (0, sum(ranks) % 2))
    halves = cache.update(*joined.chunk(2, dim=-1), layer_idx=layer_idx, kwargs=kwargs)
    latent, key_rope = torch.cat(halves, dim=-1)[..., : sum(ranks)].split(ranks, dim=-1)
    return latent, key_rope


class LatentBatchingMixin(GenerationMixin):
    """Makes `generate_batch`, `init_continuous_batching` and `continuous_batching_context_manager` work."""

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> ContinuousBatchingManager:
        """As in transformers: a manager to add requests to. Tested with the attention implementations sdpa and eager.

        Raises:
            ValueError: the generation configuration asks for `use_mtp`, which continuous batching cannot do.
        """
        if (self.generation_config if generation_config is None else generation_config).use_mtp:
            raise ValueError("use_mtp: found True, allowed False in continuous batching; generate() can draft")
        manager = super().init_continuous_batching(generation_config, *args, **kwargs)
        manager._create_batch_processor = MethodType(_create_batch_processor, manager)
        return manager


def _create_batch_processor(manager: ContinuousBatchingManager) -> Any:
    """The manager's own method, with the cache sized for latents."""
    model: Any = manager.model
    # Flash attention's decoding kernel would read the pages as keys and values.
    manager.continuous_batching_config.max_blocks_per_request = 0
    config = model.config
    model.config = _PagedView(config)
    try:
        return ContinuousBatchingManager._create_batch_processor(manager)
    finally:
        model.config = config
