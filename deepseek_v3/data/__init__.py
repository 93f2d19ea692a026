"""Data: corpora, packing, the order of samples, tables of rows, and the baselines a model must beat."""

from .batches import batch_indices, iterate_batches, sample_order
from .corpora import Corpus, build_corpus, load_corpus
from .heldout import heldout_bits_per_byte
from .metrics import bits_per_byte
from .packing import IGNORE_INDEX, PackedDataset, pack_documents, tokenize_documents
from .rows import Row, RowSource, read_file_rows, read_rows
from .sources import Document
from .text_baselines import document_bytes, gzip_bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte

__all__ = [
    "IGNORE_INDEX",
    "Corpus",
    "Document",
    "PackedDataset",
    "Row",
    "RowSource",
    "batch_indices",
    "bits_per_byte",
    "build_corpus",
    "document_bytes",
    "gzip_bits_per_byte",
    "heldout_bits_per_byte",
    "iterate_batches",
    "load_corpus",
    "ngram_bits_per_byte",
    "pack_documents",
    "read_file_rows",
    "read_rows",
    "sample_order",
    "tokenize_documents",
    "xz_bits_per_byte",
]
