"""What a language model has to beat, in bits per byte of the same held-out text: compressors and 5-gram models."""

import gzip
import lzma
from collections.abc import Iterable, Sequence

import numpy as np

from .metrics import bits_per_byte
from .ngram import NgramModel
from .sources import Document


def gzip_bits_per_byte(documents: Iterable[Document]) -> float:
    """gzip -9 of the documents, concatenated in order (window 32 KB; it sees no training text)."""
    data = _concatenate(documents)
    return _compressed_bits_per_byte(len(gzip.compress(data, compresslevel=9, mtime=0)), len(data))


def xz_bits_per_byte(documents: Iterable[Document], training: Iterable[Document] = ()) -> float:
    """xz -9 of the documents, concatenated in order.

    Args:
        training: documents the compressor may look back at: the figure is then the growth of the archive when the
            held-out text is appended to the training text. xz -9 has a 64 MiB window.
    """
    data, known = _concatenate(documents), _concatenate(training)
    n_known = _xz_size(known) if known else 0
    return _compressed_bits_per_byte(_xz_size(known + data) - n_known, len(data))


def ngram_bits_per_byte(
    train_tokens: Iterable[Sequence[int] | np.ndarray],
    heldout_tokens: Iterable[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    heldout_bytes: int,
    order: int = 5,
) -> float:
    """Modified Kneser-Ney over the model's own tokens: train on one split, score the other.

    Document ends are predicted and paid for, as the neural model's EOS is.

    Args:
        train_tokens, heldout_tokens: token ids per document, without special tokens. `document_bytes` makes a byte
            model's input (``vocab_size=256``).
        heldout_bytes: UTF-8 bytes of the text behind `heldout_tokens`.
    """
    nats = NgramModel(train_tokens, vocab_size, order).token_nats(heldout_tokens)
    return bits_per_byte(float(nats.sum()), heldout_bytes)


def document_bytes(documents: Iterable[Document]) -> list[np.ndarray]:
    """The UTF-8 bytes of each document as uint8 arrays: the tokens of a byte-level model."""
    return [np.frombuffer(doc.text.encode(), dtype=np.uint8) for doc in documents]


def _concatenate(documents: Iterable[Document]) -> bytes:
    return b"".join(doc.text.encode() for doc in documents)


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


def _compressed_bits_per_byte(compressed_bytes: int, n_bytes: int) -> float:
    return bits_per_byte(compressed_bytes * 8 * np.log(2), n_bytes)
