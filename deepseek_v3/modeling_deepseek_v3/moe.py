"""DeepSeekMoE with auxiliary-loss-free load balancing (paper 2.1.2).

Shape legend: N tokens, E experts, K chosen per token, H hidden, I expert's intermediate size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN, SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    use_experts_implementation,
)
from transformers.utils.generic import maybe_autocast

from ..configuration import DeepseekV3Config
from ..kernels.experts import grouped_swiglu_experts
from ..kernels.experts.lora import grouped_lora_experts, is_quantized
from ..kernels.router import route
from .layers import DeepseekV3MLP, Fp32Buffers

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # the fused weights


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
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        weights, indices, _ = route(
            logits,
            self.e_score_correction_bias,
            self.top_k,
            self.num_group,
            self.topk_group,
            self.norm_topk_prob,
            self.routed_scaling_factor,
        )
        return logits, weights, indices

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


def grouped_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation `"deepseek_v3"`: `kernels.experts`, for this model and for every other MoE model.

    `hidden_states [N, H]`, `top_k_index [N, K]` int64 (an index of E marks a choice that another rank computes),
    `top_k_weights [N, K]` -> `[N, H]`. Experts that are not SwiGLU on fused weights without biases are left to
    transformers' `"grouped_mm"`.
    """
    if not is_fused_swiglu(self):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    # Autocast does not reach the op, as it does not reach grouped_mm.
    hidden, weights = hidden_states.to(self.gate_up_proj.dtype), (self.gate_up_proj, self.down_proj)
    if any(map(is_quantized, weights)):
        output = grouped_lora_experts(hidden, top_k_index, top_k_weights, *weights, None, None)
    else:
        output = grouped_swiglu_experts(hidden, top_k_index, top_k_weights, *weights)
    return output.to(hidden_states.dtype)


def is_fused_swiglu(experts: nn.Module) -> bool:
    """Whether a module is the routed experts of a model and `kernels.experts` computes them."""
    traits = ("has_gate", "is_concatenated", "has_bias", "is_transposed", "has_post_expert_norm")
    if [name for name in traits if getattr(experts, name, False)] != ["has_gate", "is_concatenated"]:
        return False
    return type(experts)._apply_gate is _default_apply_gate and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)


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

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also takes the experts one by one, by their official names: `Trainer` loads a checkpoint's files so when it
        resumes, and would leave the experts as they were. A file may hold some of them only."""
        if not is_quantized(self.gate_up_proj) and not is_quantized(self.down_proj):
            state_dict = self._with_fused(state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _with_fused(self, state_dict, prefix: str, errors: list[str]) -> dict[str, torch.Tensor]:
        """Single experts are put into copies of the fused weights; torch checks, casts or assigns those."""
        half = self.intermediate_dim
        places = {
            "gate_proj": ("gate_up_proj", slice(0, half)),
            "up_proj": ("gate_up_proj", slice(half, None)),
            "down_proj": ("down_proj", slice(None)),
        }
        fused: dict[str, torch.Tensor] = {}
        state_dict = dict(state_dict)
        for expert in range(self.num_experts):
            for projection, (weight, rows) in places.items():
                name = f"{prefix}{expert}.{projection}.weight"
                if (given := state_dict.pop(name, None)) is None:
                    continue
                own = getattr(self, weight)
                if given.shape != own[expert, rows].shape:
                    errors.append(
                        f"size mismatch for {name}: found {list(given.shape)}, allowed {list(own[expert, rows].shape)}"
                    )
                    continue
                if weight not in fused:
                    nan = torch.full_like(own, torch.nan, device=given.device)  # loud, should an expert be missing
                    fused[weight] = nan if own.is_meta else own.clone()
                fused[weight][expert, rows] = given
        return state_dict | {f"{prefix}{weight}": tensor for weight, tensor in fused.items()}

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
