"""The configuration of a DeepSeek-V3 model: the official fields under their official names, and three of ours."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig

from . import untrusted, validation

# MLA under tensor parallelism: heads are split where the latents are expanded and joined at the output. The latent
# down-projections and their norms are replicated; `mla_kv_a_proj` sums the gradient of the rotary key, which skips
# `kv_b_proj`. Stock V3 replicates all of attention; transformers' deepseek_v2 splits it this way.
ATTENTION_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


@validation.raise_value_errors
@strict
class DeepseekV3Config(PreTrainedConfig):
    """Describes a DeepSeek-V3 model (arXiv 2412.19437). The defaults are those of the 671B model.

    Reads every official `config.json` unchanged; what it writes is complete for transformers, vLLM, SGLang and
    llama.cpp, which ignore the three training fields. Kernel choices (`attn_implementation`,
    `experts_implementation`) are arguments of `from_pretrained` and never stored.

    Args:
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP in the dense layers.
        moe_intermediate_size: inner width of one expert, routed or shared.
        num_hidden_layers: layers of the main model, MTP layers not counted.
        num_attention_heads: heads of MLA (2.1.1).
        num_key_value_heads: equals `num_attention_heads`, and is by default; kept because the official files have it.
        q_lora_rank: width of the query latent c^Q (eq. 6); None projects queries directly.
        kv_lora_rank: width of the key-value latent c^KV that the cache holds (eq. 1).
        qk_nope_head_dim: width per head of the key part without position.
        qk_rope_head_dim: width of the rotary key shared by all heads (eq. 3); even.
        v_head_dim: width per head of the values.
        n_routed_experts: routed experts per MoE layer (2.1.2).
        n_shared_experts: experts that every token visits, stored as one MLP of their joint width.
        num_experts_per_tok: routed experts per token, K_r (eq. 14).
        n_group: groups the routed experts are split into; None means 1, no group limit.
        topk_group: groups a token may choose from; None means 1.
        norm_topk_prob: divide the chosen gates by their sum (eq. 13).
        routed_scaling_factor: multiplies the gates afterwards.
        scoring_func: "sigmoid", the only scoring of V3 (eq. 15).
        topk_method: "noaux_tc", top-k of score plus bias (eq. 16).
        moe_layer_freq: 1, every layer after the dense ones is MoE.
        first_k_dense_replace: number of leading dense layers; `num_hidden_layers` or more means all are dense.
        num_nextn_predict_layers: MTP modules D (2.2), stored as layers `num_hidden_layers` and up; also readable as
            `num_mtp_layers`.
        max_position_embeddings: longest sequence, in tokens, after RoPE scaling.
        rope_parameters: `rope_type` ("default", "linear", "dynamic" or "yarn"), `rope_theta` and the numbers of the
            scaling; the older `rope_scaling` + `rope_theta` are accepted in its place.
        rope_interleave: rotate neighbouring pairs, as the official weights expect.
        bias_update_speed: gamma, the step of the routing bias after each optimizer step (2.1.2). 0 freezes it.
        seq_balance_coef: alpha, weight of the sequence-wise balance loss (eq. 17 to 20). The official files'
            `aux_loss_alpha` is a leftover that V3 was not trained with; it is kept but not read.
        mtp_loss_coef: lambda, weight of the mean MTP loss (eq. 25).

    Raises:
        ValueError: `field: found X, allowed Y`, for a value outside its range, fields that contradict each other, an
            unknown private key, or a file that is not a readable JSON object.
    """

    model_type = "deepseek_v3"
    # Fields of the models' outputs that are no predictions: `Trainer` hands the rest to `compute_metrics`.
    keys_to_ignore_at_inference = [
        "past_key_values", "ce_loss", "mtp_loss", "balance_loss", "router_logits", "router_indices"
    ]  # fmt: skip

    # Style names belong to the installed transformers (5.17 and 5.23 differ), so stock's own plans are the base.
    base_model_tp_plan = {**ATTENTION_TP_PLAN, **StockConfig.base_model_tp_plan}
    base_model_ep_plan = dict(StockConfig.base_model_ep_plan)
    base_model_pp_plan = dict(StockConfig.base_model_pp_plan)

    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    output_router_logits: bool = False
    routed_scaling_factor: float | int = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int | None = 8
    topk_group: int | None = 4
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    num_nextn_predict_layers: int = 1
    # Training, ours: other readers ignore them.
    bias_update_speed: float | int = 0.001
    seq_balance_coef: float | int = 1e-4
    mtp_loss_coef: float | int = 0.3

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))
        # Two are derived here from the other dimensions. `auto_map` names code of the repository the file came from:
        # with it, transformers would build that repository's model around this class.
        for key in ("head_dim", "qk_head_dim", "auto_map", *untrusted.OBSOLETE_KEYS):
            kwargs.pop(key, None)

        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.n_group = 1 if self.n_group is None else self.n_group
        self.topk_group = 1 if self.topk_group is None else self.topk_group
        self.attention_dropout = 0.0 if self.attention_dropout is None else self.attention_dropout

        self.rope_parameters = validation.merge_legacy_rope(
            self.rope_parameters, kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None)
        )
        untrusted.check_extra_keys(type(self), kwargs)
        validation.check_ranges(self)
        validation.check_labels(kwargs.get("torch_dtype"), self.id2label, kwargs.get("num_labels"))
        validation.check_labels(self.dtype, self.id2label, kwargs.get("num_labels"))
        validation.check_quantization(kwargs.get("quantization_config"))
        for field in validation.FLOAT_RANGES:  # stock refuses `"routed_scaling_factor": 1`, so save it as 1.0
            setattr(self, field, float(getattr(self, field)))
        super().__post_init__(**kwargs)

    @property
    def qk_head_dim(self) -> int:
        """Width per head of queries and keys: `qk_nope_head_dim + qk_rope_head_dim`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """Width that RoPE rotates, under the name transformers' RoPE code looks for: `qk_rope_head_dim`."""
        return self.qk_rope_head_dim

    def validate_architecture(self) -> None:
        validation.check_ranges(self)
        validation.check_attention(self)
        validation.check_routing(self)

    def validate_token_ids(self) -> None:
        validation.check_token_ids(self)

    def validate_rope(self) -> None:
        validation.check_rope(self.rope_parameters)
        super().validate_rope()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of a `config.json`; `kwargs` override it and are validated with it."""
        with untrusted.naming_file(kwargs.get("name_or_path")):  # which AutoConfig passes
            untrusted.check_file_content(config_dict)
            result = super().from_dict(dict(config_dict), **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            config.validate()  # the base class sets the overrides after its own validation
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; a `ConfigError` names the file or repository, too."""
        with untrusted.naming_file(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        content = untrusted.read_json(json_file)
        untrusted.check_file_content(content)
        return cls._decode_special_floats(content)

    def to_dict(self) -> dict[str, Any]:
        """As in the base class, without the private attributes that tools hang on a configuration at run time."""
        return {k: v for k, v in super().to_dict().items() if not k.startswith("_") or k == "_name_or_path"}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: every field, and RoPE in the older spelling too.

        Readers from before `rope_parameters` (transformers 4, DeepSeek's own code) would otherwise fall back to
        theta = 10000 without scaling and say nothing.
        """
        content = super().to_diff_dict()
        rope = dict(self.rope_parameters or {})
        content["rope_theta"] = rope.pop("rope_theta", None)
        content["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return content
