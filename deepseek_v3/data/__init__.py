"""Data for pretraining: corpora, packing, the order of samples, and the baselines a model must beat."""

from .batches import batch_indices, iterate_batches, sample_order
from .corpora import Corpus, build_corpus, load_corpus
from .metrics import bits_per_byte
from .packing import IGNORE_INDEX, PackedDataset, pack_documents, tokenize_documents
from .sources import Document
from .text_baselines import document_bytes, gzip_bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte

__all__ = [
    "IGNORE_INDEX",
    "Corpus",
    "Document",
    "PackedDataset",
    "batch_indices",
    "bits_per_byte",
    "build_corpus",
    "document_bytes",
    "gzip_bits_per_byte",
    "iterate_batches",
    "load_corpus",
    "ngram_bits_per_byte",
    "pack_documents",
    "sample_order",
    "tokenize_documents",
    "xz_bits_per_byte",
]
