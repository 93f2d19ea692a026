"""A Llama-type model becomes a DeepSeek-V3 model: attention layers through `attention`, MLPs through `experts`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import DeepseekV3Config
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from .attention import HeadLayout, attention_weights
from .experts import expert_weights

CALIBRATION_BATCH = 4


def check_source(model: PreTrainedModel) -> None:
    """Refuse what has no exact counterpart here: a ValueError that names the field."""
    config: Any = model.config
    if config.model_type != "llama":
        raise ValueError(f"model_type: found {config.model_type!r}, allowed 'llama'")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act: found {config.hidden_act!r}, allowed 'silu'")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_parameters['rope_type']: found {kind!r}, allowed 'default'")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field):
            raise ValueError(f"{field}: found True, allowed False: MLA and the experts have no biases")


def target_config(
    source: Any, kv_lora_rank: int | None, qk_rope_head_dim: int | None, n_experts: int, top_k: int, n_shared: int,
    first_k_dense: int,
) -> DeepseekV3Config:  # fmt: skip
    """The configuration of the converted model; `source` is a LlamaConfig. See `convert_llama` for the arguments."""
    head_dim = source.head_dim
    rope = head_dim if qk_rope_head_dim is None else qk_rope_head_dim
    rank = min(512, source.hidden_size) if kv_lora_rank is None else kv_lora_rank
    if rope % head_dim or not head_dim <= rope <= head_dim * source.num_key_value_heads:
        raise ValueError(
            f"qk_rope_head_dim: found {rope}, allowed multiples of the source's head width {head_dim} up to "
            f"{head_dim} x {source.num_key_value_heads} key-value heads: only those grids hold its frequencies"
        )
    if not 1 <= rank <= source.hidden_size:
        raise ValueError(f"kv_lora_rank: found {rank}, allowed 1 to the source's hidden_size {source.hidden_size}")
    if n_shared < 1 or source.intermediate_size % (n_shared + 1):
        raise ValueError(
            f"n_shared: found {n_shared}, allowed are numbers from 1 with which the source's "
            f"{source.intermediate_size} neurons divide into so many shared and one routed expert of equal width"
        )
    return DeepseekV3Config(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        moe_intermediate_size=source.intermediate_size // (n_shared + 1),
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        n_shared_experts=n_shared,
        n_routed_experts=n_experts,
        num_experts_per_tok=top_k,
        first_k_dense_replace=first_k_dense,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=head_dim,
        rms_norm_eps=source.rms_norm_eps,
        max_position_embeddings=source.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": source.rope_parameters["rope_theta"]},
        tie_word_embeddings=source.tie_word_embeddings,
        initializer_range=source.initializer_range,
        pad_token_id=None if source.pad_token_id == -1 else source.pad_token_id,  # -1: none, as Llama once said it
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        num_nextn_predict_layers=0,
    )


def convert_llama(
    model: PreTrainedModel,
    calibration: torch.Tensor,
    *,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    n_experts: int = 8,
    top_k: int = 2,
    n_shared: int = 3,
    first_k_dense: int = 1,
    seed: int = 0,
) -> DeepseekV3ForCausalLM:
    """Build the DeepSeek-V3 model that computes what `model` does, as nearly as MLA allows. fp32, evaluation mode.

    Exact are: the experts, always; keys and values without their positions, at `kv_lora_rank` = hidden size; the
    positions, with one key-value head. Of several key-value heads the principal component per frequency keeps its
    rotation, `qk_rope_head_dim` = m head widths keep m - 1 more at a slightly wrong speed, and the rest loses it.

    Args:
        model: a LlamaForCausalLM without biases and without RoPE scaling.
        calibration: token ids `[B, S]` int64 of ordinary text; a few thousand tokens are enough, and B * S should
            exceed the hidden size several times.
        kv_lora_rank: width of the latent, at most the hidden size. Default: 512, or the hidden size if that is less.
        qk_rope_head_dim: width of the rotary key, a multiple of the source's head width. Default: that width.
        n_experts, top_k: routed experts per MoE layer, and how many of them a token visits.
        n_shared: shared experts. One expert has `intermediate_size / (n_shared + 1)` neurons.
        first_k_dense: leading layers whose MLP stays dense; the number of layers keeps all of them so.
        seed: of the routers.

    Raises:
        ValueError: an unsupported source, or widths that do not fit it; the message names the field.
    """
    check_source(model)
    config = target_config(
        model.config, kv_lora_rank, qk_rope_head_dim, n_experts, top_k, n_shared, first_k_dense
    )
    converted = DeepseekV3ForCausalLM(config).eval()
    source = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    state = {name: source[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    inputs = norm_inputs(model, calibration)
    layout = HeadLayout(
        config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim, config.qk_rope_head_dim,
        config.kv_lora_rank,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        gamma = source[layer + "input_layernorm.weight"]
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (source[f"{layer}self_attn.{name}.weight"] * gamma for name in names)
        o = source[layer + "self_attn.o_proj.weight"]
        hidden = inputs.pop(layer + "input_layernorm")
        q, k, v, o, hidden = (tensor.double() for tensor in (q, k, v, o, hidden))
        attention = attention_weights(q, k, v, o, hidden, layout)
        state |= {f"{layer}self_attn.{name}": tensor for name, tensor in attention.items()}
        state[layer + "input_layernorm.weight"] = torch.ones_like(gamma)

        gamma = source[layer + "post_attention_layernorm.weight"]
        hidden = inputs.pop(layer + "post_attention_layernorm") * gamma
        gate, up, down = (source[f"{layer}mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
        if i < first_k_dense:
            mlp = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        else:
            mlp = expert_weights(gate, up, down, hidden, n_experts, top_k, n_shared, generator)
        state |= {f"{layer}mlp.{name}": tensor for name, tensor in mlp.items()}
        state[layer + "post_attention_layernorm.weight"] = gamma
    converted.load_state_dict(state)
    return converted


@torch.no_grad()
def norm_inputs(model: PreTrainedModel, calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer's two norms return on `calibration [B, S]` before their weight.

    By module name: `[B * S, D]` fp32.
    """
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, eps: float):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].float().flatten(0, -2)
            seen.setdefault(name, []).append(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

        return hook

    names = ("input_layernorm", "post_attention_layernorm")
    norms = {name: module for name, module in model.named_modules() if name.endswith(names)}
    handles = [module.register_forward_hook(watch(name, module.variance_epsilon)) for name, module in norms.items()]
    try:
        for batch in calibration.split(CALIBRATION_BATCH):
            model.model(batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).cpu() for name, parts in seen.items()}
