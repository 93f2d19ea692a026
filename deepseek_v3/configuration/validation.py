"""What a DeepSeek-V3 configuration may hold, and the errors that say so.

A `config.json` is a file from a stranger: every size decides an allocation and every unknown key becomes an attribute.
So each field has a range, wide enough for any real model and narrow enough that a typo or an attack is refused before
anything is built. Every failure is a `ConfigError`, a `ValueError` of the form `field: found X, allowed Y`.
"""

import functools
from typing import Any

from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError

from .patterns import is_name, pattern_problem


class ConfigError(StrictDataclassError, ValueError):
    """A configuration value that cannot be used: names the field, what was found and what is allowed."""


# Field -> smallest and largest allowed value, both included. DeepSeek-V3 sits at least a factor of eight inside.
INT_RANGES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "moe_intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "q_lora_rank": (1, 2**17),
    "kv_lora_rank": (1, 2**17),
    "qk_nope_head_dim": (1, 4096),
    "qk_rope_head_dim": (2, 4096),
    "v_head_dim": (1, 4096),
    "n_routed_experts": (2, 16384),  # two, because a group is scored by its two best experts
    "n_shared_experts": (1, 256),
    "num_experts_per_tok": (1, 16384),
    "n_group": (1, 16384),
    "topk_group": (1, 16384),
    "first_k_dense_replace": (0, 1024),
    "num_nextn_predict_layers": (0, 64),
    "max_position_embeddings": (1, 2**28),
    "pretraining_tp": (1, 2**16),
}
FLOAT_RANGES = {
    "rms_norm_eps": (1e-20, 1.0),
    "initializer_range": (0.0, 10.0),
    "attention_dropout": (0.0, 1.0),
    "routed_scaling_factor": (1e-6, 1e6),
    "bias_update_speed": (0.0, 1.0),
    "seq_balance_coef": (0.0, 100.0),
    "mtp_loss_coef": (0.0, 100.0),
}
CHOICES: dict[str, tuple] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "hidden_act": ("silu",),
}
# Over all layers; DeepSeek-V3 has 15,104. Three tensors each must have a name, a shape and a place in a file.
MAX_EXPERTS = 2**17
MAX_LABELS = 2**17  # ICD-10-CM has 74,000 codes
MAX_PATTERNS = 1000  # regular expressions in a quantization_config; names are not counted
NULLABLE = {"q_lora_rank", "pretraining_tp"}
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")

# rope_parameters: key -> allowed range. `None` stands for "not given", as in the official files.
ROPE_RANGES = {
    "rope_theta": (1.000001, 1e12),
    "factor": (1.0, 1e6),
    "original_max_position_embeddings": (1, 2**28),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 100.0),
    "mscale_all_dim": (0.0, 100.0),
    "attention_factor": (1e-6, 1e6),
    "partial_rotary_factor": (1.0, 1.0),  # MLA splits the head itself: all of qk_rope_head_dim is rotated
}
DEFAULT_ROPE_THETA = 10_000.0
ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def fail(field: str, found: Any, allowed: str) -> ConfigError:
    """Build the one error message of this room: `field: found X, allowed Y`."""
    text = repr(found)
    return ConfigError(f"{field:.200}: found {text if len(text) <= 80 else text[:77] + '...'}, allowed {allowed}")


def allowed_values(field: str) -> str | None:
    """Describe what `field` may hold, or None for a field without a range."""
    orelse = " or null" if field in NULLABLE else ""
    if field in INT_RANGES:
        return "an integer from {} to {}".format(*INT_RANGES[field]) + orelse
    if field in FLOAT_RANGES:
        return "a number from {:g} to {:g}".format(*FLOAT_RANGES[field]) + orelse
    if field in CHOICES:
        return " or ".join(map(repr, CHOICES[field]))
    return None


def is_number(value: Any, kind: type | tuple = (int, float)) -> bool:
    """Whether `value` is of `kind`; true and false are not numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_ranges(config: Any) -> None:
    """Refuse a number outside its range, of the wrong type or not finite, and an unsupported choice."""
    for ranges, kind in ((INT_RANGES, int), (FLOAT_RANGES, (int, float))):
        for field, (low, high) in ranges.items():
            value = getattr(config, field)
            if value is None and field in NULLABLE:
                continue
            if not is_number(value, kind) or not low <= value <= high:  # NaN fails every comparison
                raise fail(field, value, str(allowed_values(field)))
    for field, choices in CHOICES.items():
        if getattr(config, field) not in choices:
            raise fail(field, getattr(config, field), str(allowed_values(field)))


def check_attention(config: Any) -> None:
    """MLA (section 2.1.1): rotation works on pairs, and every head has its own keys and values."""
    if config.qk_rope_head_dim % 2:
        raise fail("qk_rope_head_dim", config.qk_rope_head_dim, "an even number: RoPE rotates pairs of dimensions")
    if config.num_key_value_heads != config.num_attention_heads:
        heads = config.num_attention_heads
        raise fail("num_key_value_heads", config.num_key_value_heads, f"num_attention_heads = {heads}: MLA has no GQA")


def check_routing(config: Any) -> None:
    """Group-limited top-k routing (section 2.1.2) must be able to pick its experts."""
    experts, groups = config.n_routed_experts, config.n_group
    layers = config.num_hidden_layers + config.num_nextn_predict_layers - config.first_k_dense_replace
    if experts * layers > MAX_EXPERTS:
        allowed = f"at most {MAX_EXPERTS} / {layers} MoE layers = {MAX_EXPERTS // layers}"
        raise fail("n_routed_experts", experts, allowed)
    if experts % groups:
        raise fail("n_group", groups, f"a divisor of n_routed_experts = {experts}")
    if groups > 1 and experts // groups < 2:
        raise fail("n_group", groups, f"at most n_routed_experts / 2 = {experts // 2}: two experts score a group")
    if config.topk_group > groups:
        raise fail("topk_group", config.topk_group, f"at most n_group = {groups}")
    reachable = experts // groups * config.topk_group
    if config.num_experts_per_tok > reachable:
        where = f"n_routed_experts / n_group * topk_group = {experts} / {groups} * {config.topk_group}"
        raise fail("num_experts_per_tok", config.num_experts_per_tok, f"at most {where} = {reachable}")


def check_token_ids(config: Any) -> None:
    """Special tokens must be rows of the embedding table."""
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = getattr(config, field)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and not (is_number(token, int) and 0 <= token < config.vocab_size):
                raise fail(field, ids, f"from 0 to vocab_size - 1 = {config.vocab_size - 1}, or null")


def check_rope(rope: Any) -> None:
    """Check rope_parameters: plain RoPE, or a scaled one with every number its formula divides by (YaRN, section 4.3).

    transformers fills a missing `original_max_position_embeddings` with the *extended* length and only warns about a
    bad factor; both give a model that runs and answers nonsense, so here both are errors.
    """
    if not isinstance(rope, dict):
        raise fail("rope_parameters", rope, "an object such as {'rope_type': 'default', 'rope_theta': 10000.0}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_REQUIRED:
        raise fail("rope_parameters['rope_type']", kind, "one of " + ", ".join(map(repr, ROPE_REQUIRED)))
    for key in ("rope_theta", *ROPE_REQUIRED[kind]):
        if rope.get(key) is None:
            raise fail(f"rope_parameters['{key}']", None, f"a number: rope_type {kind!r} needs it")
    for key, value in rope.items():
        if isinstance(value, dict | list):
            raise fail(f"rope_parameters['{key}']", value, "a single value: all layers share one RoPE")
        if key in ROPE_RANGES and value is not None:
            low, high = ROPE_RANGES[key]
            integer = isinstance(low, int)
            if not is_number(value, int if integer else (int, float)) or not low <= value <= high:
                noun = "an integer" if integer else "a number"
                raise fail(f"rope_parameters['{key}']", value, f"{noun} from {low:g} to {high:g}")
    slow, fast = rope.get("beta_slow") or 1, rope.get("beta_fast") or 32  # YaRN's own defaults
    if slow > fast:
        raise fail("rope_parameters['beta_slow']", slow, f"at most beta_fast = {fast}")


def merge_legacy_rope(rope_parameters: Any, rope_scaling: Any, rope_theta: Any) -> dict:
    """Join transformers 5's `rope_parameters` with the older pair `rope_scaling` + `rope_theta` of official files.

    Our own files hold both spellings (see `DeepseekV3Config.to_diff_dict`), so both may be given, but not disagree.
    """
    for field, value in (("rope_parameters", rope_parameters), ("rope_scaling", rope_scaling)):
        if value is not None and not isinstance(value, dict):
            raise fail(field, value, "an object or null")
    legacy = dict(rope_scaling or {})
    if rope_theta is not None:
        legacy.setdefault("rope_theta", rope_theta)
    merged = dict(rope_parameters or {})
    for key, value in legacy.items():
        known = "rope_type" if key == "type" and "type" not in merged else key
        if known in merged and merged[known] != value:
            raise fail(f"rope_parameters['{known}']", merged[known], f"{value!r}, as in rope_scaling / rope_theta")
        merged.setdefault(key, value)
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = DEFAULT_ROPE_THETA
    check_rope(merged)
    return merged


def check_labels(dtype: Any, id2label: Any, num_labels: Any) -> None:
    """Check what the base class would otherwise trust: it builds one label per `num_labels`, however many."""
    named = isinstance(dtype, str) and dtype in DTYPES
    if dtype is not None and not named and type(dtype).__name__ != "dtype":
        raise fail("dtype", dtype, "one of " + ", ".join(DTYPES))
    if num_labels is not None and not (is_number(num_labels, int) and 0 <= num_labels <= MAX_LABELS):
        raise fail("num_labels", num_labels, f"an integer from 0 to {MAX_LABELS}")
    if id2label is not None and not (
        isinstance(id2label, dict)
        and len(id2label) <= MAX_LABELS
        and all(is_number(key, int) or str(key).isdecimal() and len(str(key)) < 10 for key in id2label)
    ):
        raise fail("id2label", id2label, f"an object from label numbers to names, at most {MAX_LABELS}")


def check_quantization(value: Any) -> None:
    """Check the form of a file's `quantization_config`; whether its method can be read is decided at loading.

    Its lists of modules are matched against the name of every module, as regular expressions by some readers.
    """
    if value is None or hasattr(value, "quant_method"):  # an object comes from the caller
        return
    if not isinstance(value, dict):
        raise fail("quantization_config", value, "an object or null")
    method = value.get("quant_method")
    if not isinstance(method, str):
        raise fail("quantization_config['quant_method']", method, "the name of a method")
    stack: list[tuple[str, Any]] = [("quantization_config", value)]
    patterns = 0
    while stack:
        where, item = stack.pop()
        children = item.items() if isinstance(item, dict) else (("", child) for child in item)
        for key, child in children:
            if isinstance(child, dict | list):
                stack.append((f"{where}[{key!r:.40}]" if key else where, child))
            elif isinstance(item, list) and isinstance(child, str):
                pattern = child.removeprefix("re:")
                patterns += not is_name(pattern)
                if patterns > MAX_PATTERNS:
                    raise fail(where, child, f"at most {MAX_PATTERNS} patterns")
                if problem := pattern_problem(pattern):
                    raise fail(where, child, f"no pattern with {problem}")


def raise_value_errors(cls: type) -> type:
    """Class decorator above `@strict`: its errors derive from Exception alone; re-raise them as `ConfigError`.

    A wrong type is reported with the field's whole allowed range instead of the bare Python type.
    """
    methods: Any = cls  # mypy knows nothing of what `@strict` put there
    strict_setattr: Any = methods.__setattr__

    @functools.wraps(strict_setattr)
    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            strict_setattr(self, name, value)
        except StrictDataclassFieldValidationError as error:
            kind = methods.__dataclass_fields__[name].type
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise fail(name, value, allowed_values(name) or expected) from error

    def translated(method: Any) -> Any:
        @functools.wraps(method)  # also copies the mark by which `@strict` on a subclass knows its own `validate`
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                method(self, *args, **kwargs)
            except ConfigError:
                raise
            except StrictDataclassError as error:
                raise ConfigError(str(error.__cause__ or error)) from error

        return call

    methods.__setattr__ = __setattr__
    methods.__init__, methods.validate = translated(methods.__init__), translated(methods.validate)
    return cls
