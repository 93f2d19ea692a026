"""DeepSeekMoE with auxiliary-loss-free load balancing (paper 2.1.2).

Shape legend: N tokens, E experts, K chosen per token, H hidden, I expert's intermediate size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm, use_experts_implementation
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration import DeepseekV3Config
from .layers import DeepseekV3MLP, Fp32Buffers


class DeepseekV3TopkRouter(Fp32Buffers):
    """Sigmoid scores, a routing bias that only affects the choice, and group-limited top-k (eq. 13-16).

    `e_score_correction_bias` `[E]` stays fp32 whatever the module is cast to: its updates of 0.001 vanish in bf16.
    `load_counts` `[E]` int64 holds how often each expert was chosen by a real token since the last bias update; it is
    no buffer, so that data-parallel wrappers neither broadcast nor save it.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.num_group = config.n_group or 1
        self.topk_group = config.topk_group or 1
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        self.load_counts: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[..., H]` -> logits `[N, E]` fp32, weights `[N, K]` fp32 (normalised, scaled), experts `[N, K]` int64."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.sigmoid()
        indices = self._choose(scores.detach() + self.e_score_correction_bias)
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices

    def _choose(self, biased_scores: torch.Tensor) -> torch.Tensor:
        if self.topk_group < self.num_group:
            grouped = biased_scores.view(-1, self.num_group, self.num_experts // self.num_group)
            group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)  # a group counts by its two best experts
            chosen = group_scores.topk(self.topk_group, dim=-1, sorted=False)[1]
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
            biased_scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_scores.topk(self.top_k, dim=-1, sorted=False)[1]

    @torch.no_grad()
    def count_load(self, indices: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """Add the choices `[N, K]` of the real tokens (`token_mask [N]`, all if None) to `load_counts`."""
        if self.load_counts is None or self.load_counts.device != indices.device:
            self.load_counts = torch.zeros(self.num_experts, dtype=torch.int64, device=indices.device)
        ones = torch.ones_like(indices) if token_mask is None else token_mask.long()[:, None].expand_as(indices)
        self.load_counts.scatter_add_(0, indices.flatten(), ones.flatten())

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f"{prefix}e_score_correction_bias"
        if name in state_dict:  # a bf16 copy would replace the buffer under `assign=True`
            state_dict = {**state_dict, name: state_dict[name].float()}
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Dispatch(torch.autograd.Function):
    """`rows[s] = x[token_of[s]]`, zero where `token_of[s] == N`; its gradient is a gather too, hence deterministic."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token_of: torch.Tensor, slot_of: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slot_of)
        return torch.cat((x, x.new_zeros(1, x.shape[1]))).index_select(0, token_of)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (slot_of,) = ctx.saved_tensors
        return grad.index_select(0, slot_of.flatten()).view(*slot_of.shape, -1).sum(1), None, None


class _Combine(torch.autograd.Function):
    """`y[t] = sum_k weights[t, k] * rows[slot_of[t, k]]`, accumulated in fp32."""

    @staticmethod
    def forward(
        ctx, rows: torch.Tensor, weights: torch.Tensor, token_of: torch.Tensor, slot_of: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, token_of, slot_of)
        chosen = rows.index_select(0, slot_of.flatten()).view(*slot_of.shape, -1)
        return torch.bmm(weights.unsqueeze(1), chosen.to(weights.dtype)).squeeze(1).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        rows, weights, token_of, slot_of = ctx.saved_tensors
        chosen = rows.index_select(0, slot_of.flatten()).view(*slot_of.shape, -1)
        grad_weights = torch.bmm(chosen.to(weights.dtype), grad.to(weights.dtype).unsqueeze(2)).squeeze(2)
        weight_of = weights.new_zeros(rows.shape[0], 1).index_copy_(0, slot_of.flatten(), weights.reshape(-1, 1))
        padded = torch.cat((grad, grad.new_zeros(1, grad.shape[1])))
        return padded.index_select(0, token_of) * weight_of.to(grad.dtype), grad_weights, None, None


def _row_alignment(hidden_states: torch.Tensor, rows: int, num_experts: int) -> int:
    """Each expert's rows are padded to a multiple of this. oneDNN builds a bf16 kernel per matrix shape, and every
    expert's token count is a new shape: rounding up to 64 makes shapes repeat (3x faster forward and backward)."""
    many_rows = rows >= 32 * num_experts
    bf16_on_cpu = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.bfloat16
    return 64 if bf16_on_cpu and many_rows and not is_torchdynamo_compiling() else 1


def grouped_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts as two grouped matrix products over rows sorted by expert; no token is dropped.

    `hidden_states [N, H]`, `top_k_index [N, K]` int64 (an index of E marks a choice that another rank computes),
    `top_k_weights [N, K]` fp32 -> `[N, H]`.
    """
    num_tokens, top_k = top_k_index.shape
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    experts = torch.arange(self.num_experts, device=flat.device)
    ends = torch.searchsorted(flat[order], experts, right=True)

    align = _row_alignment(hidden_states, flat.numel(), self.num_experts)
    if align == 1:
        padded_ends, num_rows, slots = ends, flat.numel(), torch.arange(flat.numel(), device=flat.device)
    else:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        padded = (counts + align - 1) // align * align
        padded_ends = padded.cumsum(0)
        shift = (padded_ends - padded) - (ends - counts)
        shift = torch.cat((shift, (padded_ends - ends)[-1:]))  # the last one for choices that another rank computes
        num_rows = flat.numel() + int(shift[-1])
        slots = torch.arange(flat.numel()) + shift[flat[order]]
    token_of = torch.full((num_rows,), num_tokens, device=flat.device).scatter_(0, slots, order // top_k)
    slot_of = torch.empty_like(flat).scatter_(0, order, slots).view(num_tokens, top_k)

    offsets = padded_ends.to(torch.int32)
    rows = _Dispatch.apply(hidden_states, token_of, slot_of)
    expert_parallel = getattr(self, "_is_expert_parallel", False)  # transformers 5.17 lacks the attribute
    if expert_parallel:
        # Rows past the last offset belong to other ranks. They are never computed and their memory is not initialised,
        # in backward as in forward: the first mask keeps that out of the input's gradient, the second of the output.
        top_k_weights = top_k_weights.masked_fill(top_k_index >= self.num_experts, 0)
        not_ours = (torch.arange(num_rows, device=rows.device) >= padded_ends[-1])[:, None]
        rows = rows.masked_fill(not_ours, 0)
    rows = self._apply_gate(_grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=offsets))
    rows = _grouped_mm(rows, self.down_proj.transpose(1, 2), offs=offsets)
    if expert_parallel:
        rows = rows.masked_fill(not_ours, 0)
    top_k_weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, rows.dtype))
    return _Combine.apply(rows, top_k_weights, token_of, slot_of)


ALL_EXPERTS_FUNCTIONS.register("deepseek_v3", grouped_experts_forward)


@use_experts_implementation
class DeepseekV3Experts(nn.Module):
    """The routed experts' weights, fused: `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The definition (`experts_implementation="eager"`): one expert after the other."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, position = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (out * top_k_weights[token, position, None]).to(output.dtype))
        return output


class DeepseekV3MoE(nn.Module):
    """Shared experts plus routed experts (eq. 12)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = DeepseekV3TopkRouter(config)
        self.experts = DeepseekV3Experts(config)
        self.shared_experts = DeepseekV3MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, S, H]` -> the same, router logits `[B*S, E]` fp32 and chosen experts `[B*S, K]`."""
        logits, weights, indices = self.gate(hidden_states)
        routed = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), indices, weights)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states), logits, indices
