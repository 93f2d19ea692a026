"""Fill-in-the-middle documents in PSM order (DeepSeek-V3 report, section 4.1: rate 0.1, cut before packing)."""

import random

from .vocabulary import FIM_BEGIN, FIM_END, FIM_HOLE


def fim_text(prefix: str, suffix: str, middle: str = "") -> str:
    """Prefix-suffix-middle order; without `middle` it is the prompt after which a model writes the middle."""
    return f"{FIM_BEGIN}{prefix}{FIM_HOLE}{suffix}{FIM_END}{middle}"


def fim_transform(text: str, rate: float, rng: random.Random) -> str:
    """One document for pretraining: with probability `rate` cut into three and reordered, otherwise as it is.

    Both cuts are uniform over the gaps between characters (Bavarian et al. 2022, arXiv 2207.14255, character level),
    so a model also learns to continue inside a word. Apply it to a whole document before tokenization, and end the
    document with EOS as any other.

    Args:
        text: one document.
        rate: 0 to 1; the V3 report uses 0.1.
        rng: source of chance, with `random() -> float in [0, 1)`; the same state gives the same document.

    Raises:
        ValueError: `rate` is outside 0 to 1.

    Example: "abcdef" cut at 2 and 5 becomes `<｜fim▁begin｜>ab<｜fim▁hole｜>f<｜fim▁end｜>cde`.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}; a probability from 0 to 1 is allowed")
    if rng.random() >= rate:
        return text
    start, end = sorted(int(rng.random() * (len(text) + 1)) for _ in range(2))
    return fim_text(text[:start], text[end:], text[start:end])
