"""The router's choice in plain torch: sigmoid scores, a bias that only affects the choice, group-limited top-k."""

import torch


def choose(biased_scores: torch.Tensor, top_k: int, num_groups: int = 1, top_groups: int = 1) -> torch.Tensor:
    """The `top_k` best experts of each token, all of the `top_groups` best groups: `[N, E]` -> `[N, K]` int64."""
    if top_groups < num_groups:
        grouped = biased_scores.unflatten(1, (num_groups, -1))
        group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)  # a group counts by its two best experts
        chosen = group_scores.topk(top_groups, dim=-1, sorted=False)[1]
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
        biased_scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    return biased_scores.topk(top_k, dim=-1, sorted=False)[1]


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights `[N, K]`, experts `[N, K]` in no particular order, counts `[E]`; in any dtype."""
    scores = logits.sigmoid()
    indices = choose(scores.detach() + bias, top_k, num_groups, top_groups)
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    real = torch.ones_like(indices) if token_mask is None else token_mask.long()[:, None].expand_as(indices)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    return weights * scale, indices, counts.scatter_add_(0, indices.flatten(), real.flatten())
