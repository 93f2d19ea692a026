"""Bits per byte: the one figure by which models, tokenizers and compressors are compared."""

import math


def bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Convert a summed negative log-likelihood into bits per UTF-8 byte of the text it covers.

    Args:
        total_nats: sum (not mean) of ``-ln p`` over every predicted token, in nats. End-of-document tokens count:
            they are part of the code length. BOS is never predicted.
        n_bytes: bytes of the UTF-8 text of those same documents (``Corpus.heldout_bytes`` for a whole held-out split).

    Raises:
        ValueError: ``n_bytes`` is not positive.
    """
    if n_bytes <= 0:
        raise ValueError(f"bits_per_byte: n_bytes must be positive, found {n_bytes}")
    return total_nats / math.log(2) / n_bytes
