"""Which neurons are shared, and routers that use every expert."""

import torch

from deepseek_v3.conversion.experts import balanced_router, expert_weights


def test_the_neurons_that_add_most_are_shared() -> None:
    hidden = torch.randn(500, 16)
    gate, up, down = torch.randn(12, 16), torch.randn(12, 16), torch.randn(16, 12)
    down[:, [2, 3, 5, 7]] *= 100
    weights = expert_weights(gate, up, down, hidden, 4, 2, 1, torch.Generator().manual_seed(0))
    assert {2, 3, 5, 7} <= {int((gate == row).all(-1).nonzero()) for row in weights["shared_experts.gate_proj.weight"]}
    assert weights["experts.gate_up_proj"].shape == (4, 12, 16) and weights["experts.down_proj"].shape == (4, 16, 6)


def test_a_router_spreads_even_tokens_that_all_point_one_way() -> None:
    hidden = torch.randn(4000, 32) + 10 * torch.ones(32)
    rows, bias = balanced_router(hidden, 8, 2, torch.Generator().manual_seed(0))
    chosen = ((hidden @ rows.T).sigmoid() + bias).topk(2).indices
    load = torch.bincount(chosen.flatten(), minlength=8).float()
    assert load.max() / load.mean() < 1.05 and load.min() / load.mean() > 0.95
    assert (hidden @ rows.T).std(0).sub(1).abs().max() < 1e-3
