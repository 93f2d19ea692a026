"""A SwiGLU MLP becomes shared and routed experts (paper 2.1.2) without changing what it computes.

Neuron j of the MLP adds act(g_j x) (u_j x) d_j to the residual stream, and the neurons' order is free. Those that add
most form the shared experts; the rest form one expert of which every routed expert is a copy. The gates of a token sum
to one, so whatever is routed, the copies add up to the rest. Training on separate tokens then makes them differ.

Shape legend: N calibration tokens, D hidden size, J neurons, E routed experts, I width of an expert.
"""

import torch
import torch.nn.functional as F

BALANCE_STEPS = 400


def neuron_contribution(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Mean squared length of what each neuron adds to the residual stream: `[J]`.

    `gate`, `up` `[J, D]`, `down` `[D, J]`, over the tokens `hidden [N, D]`.
    """
    activation = F.silu(hidden @ gate.T) * (hidden @ up.T)
    return activation.square().mean(0) * down.square().sum(0)


def expert_weights(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, hidden: torch.Tensor,
    n_experts: int, top_k: int, n_shared: int, generator: torch.Generator,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The weights of a `DeepseekV3MoE` that equals the MLP `gate`, `up` `[J, D]`, `down` `[D, J]`.

    J = (n_shared + 1) I. `hidden [N, D]`: what the MLP sees on calibration tokens.
    """
    width = gate.shape[0] // (n_shared + 1)
    order = neuron_contribution(gate, up, down, hidden).argsort(descending=True)
    shared, routed = order[: n_shared * width], order[n_shared * width :]
    router, bias = balanced_router(hidden, n_experts, top_k, generator)
    return {
        "gate.weight": router,
        "gate.e_score_correction_bias": bias,
        "experts.gate_up_proj": torch.cat((gate[routed], up[routed])).expand(n_experts, -1, -1).clone(),
        "experts.down_proj": down[:, routed].expand(n_experts, -1, -1).clone(),
        "shared_experts.gate_proj.weight": gate[shared],
        "shared_experts.up_proj.weight": up[shared],
        "shared_experts.down_proj.weight": down[:, shared],
    }


def balanced_router(
    hidden: torch.Tensor, n_experts: int, top_k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random router rows `[E, D]`, and the bias `[E]` that spreads the tokens `hidden [N, D]` evenly over experts.

    The logits have mean zero and variance one over these tokens. The bias is found as in V3's training: raised where
    an expert gets too few, by less and less.
    """
    mean = hidden.mean(0)
    rows = torch.randn(n_experts, hidden.shape[1], generator=generator)
    rows = rows - (rows @ mean)[:, None] * mean / mean.square().sum()
    rows = rows / (hidden @ rows.T).std(0)[:, None]
    scores = (hidden @ rows.T).sigmoid()
    bias = torch.zeros(n_experts)
    for step in range(BALANCE_STEPS):
        load = torch.bincount((scores + bias).topk(top_k).indices.flatten(), minlength=n_experts).float()
        bias -= 0.1 * (1 - step / BALANCE_STEPS) * (load / load.mean() - 1).clamp(-1, 1)
    return rows, bias - bias.mean()
