"""The metadata of a GGUF file of arch deepseek2: hyperparameters, in both directions, and the tokenizer.

Written against llama.cpp's `src/models/deepseek2.cpp` and `src/llama-vocab.cpp`, which silently computes something
else where a key is missing (softmax for a missing `expert_gating_func`), and aborts where one does not suit it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from gguf import GGML_QUANT_VERSION, ExpertGatingFuncType, GGUFWriter, Keys, RopeScalingType, TokenType, size_label

from ..configuration import DeepseekV3Config
from ..tokenization import DeepseekV3Tokenizer
from ..tokenization.files import MOONSHOT_PATTERN, ONE_DIGIT, THREE_DIGITS
from ..tokenization.vocabulary import SPLIT_PATTERNS
from .gguf_quantize import QUANTIZATIONS

ARCHITECTURE = "deepseek2"
LITE_BLOCKS = (26, 27)  # llama.cpp takes these for DeepSeek-V2-Lite and looks for no query latent
BYTE_LEVEL, SPLIT = "ByteLevel", "Split"


def check_config(config: DeepseekV3Config) -> None:
    """Refuse what llama.cpp would refuse, abort on, or compute differently.

    Raises:
        ValueError: names the field, what was found and what is allowed.
    """
    if config.attention_bias:
        raise ValueError("attention_bias: found True, allowed in GGUF is False: llama.cpp has no place for the biases")
    if not config.rope_interleave:
        raise ValueError("rope_interleave: found False, allowed in GGUF is True, the order of the official weights")
    if (blocks := block_count(config)) in LITE_BLOCKS and config.q_lora_rank is not None:
        found = f"{blocks} with its {config.num_nextn_predict_layers} MTP layers"
        raise ValueError(
            f"num_hidden_layers: found {found}, allowed in GGUF are other numbers than 26 and 27, or q_lora_rank "
            "null: llama.cpp takes such a model for DeepSeek-V2-Lite, which has no query latent"
        )
    rope_scaling(config)


def block_count(config: DeepseekV3Config) -> int:
    """Layers of the file: llama.cpp counts the MTP layers."""
    return config.num_hidden_layers + config.num_nextn_predict_layers


def groups(config: DeepseekV3Config) -> tuple[int, int]:
    """`expert_group_count`, `expert_group_used_count`; choosing all groups is no limit, which llama.cpp wants as 1."""
    count, used = config.n_group or 1, config.topk_group or 1
    return (count, used) if used < count else (1, 1)


def rope_scaling(config: DeepseekV3Config) -> tuple[float, float]:
    """`attn_factor` A and log multiplier M with which llama.cpp computes what the model does.

    With L = ln(factor), the model multiplies cosines and sines by c (transformers' `attention_factor`) and the scores
    by s^2, `s = 1 + 0.1 * mscale_all_dim * L`. llama.cpp (`llama-context.cpp`, `deepseek2.cpp`) multiplies the
    rotation by A, and the scores by `(A * (1 + 0.1 * M * L))^2`; for M = 0 it takes `A * (1 + 0.1 * L)` for A in both.
    With linear scaling the rotation has no factor and the scores have a further `(1 + 0.1 * L)^2`.

    Raises:
        ValueError: a kind of scaling that llama.cpp does not have.
    """
    rope: dict = config.rope_parameters or {}
    kind, factor = rope["rope_type"], rope.get("factor") or 1.0
    if kind not in ("default", "linear", "yarn"):
        raise ValueError(f"rope_parameters['rope_type']: found {kind!r}, allowed in GGUF are default, linear and yarn")
    if not rope.get("truncate", True):
        raise ValueError("rope_parameters['truncate']: found False, allowed in GGUF is True")
    log = 0.1 * math.log(factor)
    all_dim = rope.get("mscale_all_dim") or 0.0
    scores = 1 + all_dim * log if kind != "default" else 1.0
    rotation = 1.0
    if kind == "yarn":
        rotation = rope.get("attention_factor") or 0.0
        if not rotation:
            paired = rope.get("mscale") and all_dim
            rotation = (1 + rope["mscale"] * log) / scores if paired else 1 + log
    if log == 0:
        if rotation != 1:
            found = f"found {rotation} with factor 1"
            raise ValueError(f"rope_parameters['attention_factor']: {found}, allowed in GGUF is 1")
        return 1.0, 0.0
    if kind == "linear":
        return 1.0, (scores / (1 + log) - 1) / log
    if math.isclose(scores, rotation, rel_tol=1e-9):
        return rotation / (1 + log), 0.0
    return rotation, (scores / rotation - 1) / log


def add_hyperparameters(writer: GGUFWriter, config: DeepseekV3Config, quantization: str, name: str) -> None:
    """Everything but the tokenizer; the tensors must have been announced to `writer`."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(QUANTIZATIONS[quantization].file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)

    writer.add_block_count(block_count(config))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    # llama.cpp attends on the latents: one key-value head as wide as they are
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # 0: a direct q_proj; llama.cpp wants the key in any case
    writer.add_kv_lora_rank(config.kv_lora_rank)

    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    count, used = groups(config)
    writer.add_expert_group_count(count)
    writer.add_expert_group_used_count(used)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if config.num_nextn_predict_layers:
        writer.add_nextn_predict_layers(config.num_nextn_predict_layers)

    rope: dict = config.rope_parameters or {}
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "default":
        return
    attention_factor, log_multiplier = rope_scaling(config)
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    if attention_factor != 1:
        writer.add_rope_scaling_attn_factors(attention_factor)
    if log_multiplier:
        writer.add_rope_scaling_yarn_log_mul(0.1 * log_multiplier)  # llama.cpp divides by the 0.1 again


def read_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `DeepseekV3Config` that `metadata`, key -> scalar, describes: all but `tie_word_embeddings`.

    Raises:
        KeyError: a key that is missing.
        ValueError: a value that no model of this architecture has; names the key.
    """

    def get(key: str, default: Any = None) -> Any:
        name = key.format(arch=ARCHITECTURE)
        return metadata[name] if default is None else metadata.get(name, default)

    model, attention, rope, tokenizer = Keys.LLM, Keys.Attention, Keys.Rope, Keys.Tokenizer
    gating, mtp = get(model.EXPERT_GATING_FUNC), get(model.NEXTN_PREDICT_LAYERS, 0)
    if gating != ExpertGatingFuncType.SIGMOID:
        key = model.EXPERT_GATING_FUNC.format(arch=ARCHITECTURE)
        raise ValueError(f"{key}: found {gating}, allowed is {int(ExpertGatingFuncType.SIGMOID)}, sigmoid")
    return {
        "vocab_size": get(model.VOCAB_SIZE),
        "hidden_size": get(model.EMBEDDING_LENGTH),
        "intermediate_size": get(model.FEED_FORWARD_LENGTH),
        "moe_intermediate_size": get(model.EXPERT_FEED_FORWARD_LENGTH),
        "num_hidden_layers": get(model.BLOCK_COUNT) - mtp,
        "num_nextn_predict_layers": mtp,
        "num_attention_heads": get(attention.HEAD_COUNT),
        "q_lora_rank": get(attention.Q_LORA_RANK, 0) or None,
        "kv_lora_rank": get(attention.KV_LORA_RANK),
        "qk_nope_head_dim": get(attention.KEY_LENGTH_MLA) - get(rope.DIMENSION_COUNT),
        "qk_rope_head_dim": get(rope.DIMENSION_COUNT),
        "v_head_dim": get(attention.VALUE_LENGTH_MLA),
        "first_k_dense_replace": get(model.LEADING_DENSE_BLOCK_COUNT),
        "n_routed_experts": get(model.EXPERT_COUNT),
        "n_shared_experts": get(model.EXPERT_SHARED_COUNT),
        "num_experts_per_tok": get(model.EXPERT_USED_COUNT),
        "n_group": get(model.EXPERT_GROUP_COUNT),
        "topk_group": get(model.EXPERT_GROUP_USED_COUNT),
        "routed_scaling_factor": get(model.EXPERT_WEIGHTS_SCALE),
        "norm_topk_prob": get(model.EXPERT_WEIGHTS_NORM, False),
        "rms_norm_eps": get(attention.LAYERNORM_RMS_EPS),
        "max_position_embeddings": get(model.CONTEXT_LENGTH),
        "rope_parameters": _read_rope(get),
        "bos_token_id": metadata.get(tokenizer.BOS_ID),
        "eos_token_id": metadata.get(tokenizer.EOS_ID),
        "pad_token_id": metadata.get(tokenizer.PAD_ID),
    }


def _read_rope(get: Any) -> dict[str, Any]:
    """The inverse of `rope_scaling`, with `mscale` where it equals `mscale_all_dim`, as in the official files, else
    with the `attention_factor` that follows from it."""
    rope = Keys.Rope
    kind = get(rope.SCALING_TYPE, "default")
    result = {"rope_type": kind, "rope_theta": get(rope.FREQ_BASE)}
    if kind == "default":
        return result
    result["factor"] = get(rope.SCALING_FACTOR)
    log = 0.1 * math.log(result["factor"])
    rotation, multiplier = get(rope.SCALING_ATTN_FACTOR, 1.0), get(rope.SCALING_YARN_LOG_MUL, 0.0) / 0.1
    if kind == "yarn":
        result["original_max_position_embeddings"] = get(rope.SCALING_ORIG_CTX_LEN)
        result |= {"beta_fast": get(rope.SCALING_YARN_BETA_FAST, 32.0)}
        result |= {"beta_slow": get(rope.SCALING_YARN_BETA_SLOW, 1.0)}
        rotation *= 1.0 if multiplier else 1 + log
    scores = (rotation if kind == "yarn" else 1 + log) * (1 + multiplier * log)
    all_dim = max(0.0, round((scores - 1) / log, 6)) if log else 0.0
    if kind == "yarn":
        result |= {"mscale": all_dim} if rotation == 1 and all_dim else {"attention_factor": rotation}
    return result | {"mscale_all_dim": all_dim}


def add_tokenizer(writer: GGUFWriter, tokenizer: DeepseekV3Tokenizer, vocab_size: int) -> None:
    """The byte-level BPE, its special tokens and chat template. Rows of the embedding without a token are `UNUSED`.

    Raises:
        ValueError: a tokenizer that llama.cpp would run differently; names the part of tokenizer.json.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(content))

    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for token in content["added_tokens"]:
        if stripping := [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]:
            raise ValueError(f"tokenizer.json: {token['content']!r} has {stripping[0]}, allowed in GGUF is none such")
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if _is_control(token) else TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])

    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            add(number)
    writer.add_add_bos_token(tokenizer.add_bos_token)
    writer.add_add_eos_token(tokenizer.add_eos_token)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    writer.add_chat_template(template)


def _is_control(token: dict[str, Any]) -> bool:
    """As llama.cpp's converter decides: DeepSeek's chat marks are hidden from output and cannot be typed by users."""
    text = token["content"]
    return token["special"] or any(text.startswith(a) and text.endswith(b) for a, b in (("<｜", "｜>"), ("<|", "|>")))


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for how `tokenizer.json` cuts text before BPE, by what it says and not by a hash.

    Raises:
        ValueError: one that llama.cpp does not have among those that `DeepseekV3Tokenizer` reads.
    """
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer.get("normalizers") != []:
        raise ValueError(f"tokenizer.json: normalizer is {normalizer['type']}, allowed in GGUF is none")
    part = content["pre_tokenizer"] or {}
    found = tuple(_describe(piece) for piece in part.get("pretokenizers", [part]))
    ignore_merges = bool(content["model"].get("ignore_merges"))
    plain = (BYTE_LEVEL, False)
    known = {
        (*((SPLIT, pattern) for pattern in SPLIT_PATTERNS), plain): "deepseek-v3",
        ((SPLIT, THREE_DIGITS), plain): "llama-bpe" if ignore_merges else "dbrx",
        ((SPLIT, ONE_DIGIT), plain): "qwen2",
        ((SPLIT, MOONSHOT_PATTERN), plain): "kimi-k2",
        (("Digits", True), (BYTE_LEVEL, True)): "smollm",
        ((BYTE_LEVEL, True),): "gpt-2",
    }
    if found not in known:
        allowed = ", ".join(known.values())
        raise ValueError(f"tokenizer.json: pre_tokenizer is {found}, allowed in GGUF are those of {allowed}")
    return known[found]


def _describe(piece: dict[str, Any]) -> tuple[Any, ...]:
    """A step of a pre-tokenizer as far as `pre_tokenizer_name` knows it; anything unusual makes it something else."""
    match piece:
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return SPLIT, pattern
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return BYTE_LEVEL, regex
        case {"type": "Digits", "individual_digits": individual}:
            return "Digits", individual
    return tuple(sorted((key, str(value)) for key, value in piece.items()))
