import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data import IGNORE_INDEX, pack_documents, tokenize_documents

BOS, EOS = 0, 1
documents = st.lists(st.lists(st.integers(2, 70_000), max_size=12), min_size=1, max_size=12)


def reference_stream(docs):
    """Every token with its offset in its document."""
    return [(token, i) for doc in docs for i, token in enumerate([BOS, *doc, EOS])]


@settings(max_examples=200, deadline=None)
@given(docs=documents, length=st.integers(2, 9))
def test_training_rows_hold_the_stream_in_order(docs, length):
    stream = reference_stream(docs)
    if len(stream) < length:
        with pytest.raises(ValueError, match="fill no row"):
            pack_documents(docs, length, bos_id=BOS, eos_id=EOS)
        return
    packed = pack_documents(docs, length, bos_id=BOS, eos_id=EOS)
    assert len(packed) == len(stream) // length  # all but the last, partial row
    for i in range(len(packed)):
        row, expected = packed[i], stream[i * length : (i + 1) * length]
        assert row["input_ids"].tolist() == [token for token, _ in expected]
        assert row["labels"].tolist() == [IGNORE_INDEX if offset == 0 else token for token, offset in expected]
        # A document that began in an earlier row restarts at 0: its beginning is out of sight.
        positions = [min(column, offset) for column, (_, offset) in enumerate(expected)]
        assert row["position_ids"].tolist() == positions
        assert all(tensor.dtype == torch.int64 for tensor in row.values())


@settings(max_examples=200, deadline=None)
@given(docs=documents, length=st.integers(2, 9), data=st.data())
def test_evaluation_predicts_every_token_but_bos_exactly_once_and_after_the_context(docs, length, data):
    context = data.draw(st.integers(1, length - 1))
    packed = pack_documents(docs, length, bos_id=BOS, eos_id=EOS, evaluation=True, context=context)
    for i in range(1, len(packed)):
        assert packed[i]["labels"][:context].eq(IGNORE_INDEX).all()
    predicted = [label for i in range(len(packed)) for label in packed[i]["labels"][1:].tolist()]
    assert [label for label in predicted if label != IGNORE_INDEX] == [t for doc in docs for t in (*doc, EOS)]
    assert {len(packed[i]["input_ids"]) for i in range(len(packed))} == {length}


@settings(max_examples=100, deadline=None)
@given(docs=documents, length=st.integers(2, 9))
def test_zero_positions_are_exactly_the_segment_starts(docs, length):
    """What transformers reads a packed row by: a new document wherever the position does not grow by one."""
    packed = pack_documents(docs, length, bos_id=BOS, eos_id=EOS, evaluation=True)
    starts = {0, *np.cumsum([len(doc) + 2 for doc in docs]).tolist()}
    for i in range(len(packed)):
        positions = packed[i]["position_ids"]
        segments = [j for j in range(length) if j == 0 or positions[j] != positions[j - 1] + 1]
        begin, text_end = i * packed.stride, sum(len(doc) + 2 for doc in docs)
        expected = [j for j in range(length) if j == 0 or begin + j in starts or begin + j > text_end]
        assert segments == expected and all(positions[j] == 0 for j in segments)


@pytest.mark.parametrize("context", [0, 4])
def test_context_out_of_range_is_refused(context):
    with pytest.raises(ValueError, match=r"context must lie in \[1, sequence_length - 1 = 3\], found"):
        pack_documents([[5, 6]], 4, bos_id=BOS, eos_id=EOS, evaluation=True, context=context)


def test_stream_is_compact_and_rows_stack():
    packed = pack_documents([[5, 6, 7], [65_535]], 3, bos_id=BOS, eos_id=EOS)
    assert packed.stream.dtype == np.uint16
    assert pack_documents([[65_536]], 3, bos_id=BOS, eos_id=EOS).stream.dtype == np.uint32
    batch = packed.rows([1, 0])
    assert all(torch.equal(batch[key][0], packed[1][key]) and batch[key].shape == (2, 3) for key in batch)
    loader = torch.utils.data.DataLoader(packed, batch_size=2)
    assert torch.equal(next(iter(loader))["input_ids"], torch.tensor([[0, 5, 6], [7, 1, 0]]))
    with pytest.raises(IndexError, match="row 2 of a packed dataset of 2 rows"):
        packed[2]


@pytest.mark.parametrize(
    ("docs", "length", "message"),
    [
        ([], 4, "no documents"),
        ([[2]], 1, "sequence_length must be at least 2, found 1"),
        ([[2]], 4, "3 tokens fill no row of sequence_length 4"),
        ([[-2, 3, 4]], 4, "token ids must lie in"),
        ([[2**32, 3, 4]], 4, "token ids must lie in"),
        ([[5], [2, -3], [4]], 4, r"document 1: token ids must lie in \[0, 2\*\*32\), found -3 to 2"),
    ],
)
def test_errors_name_what_was_found(docs, length, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(docs, length, bos_id=BOS, eos_id=EOS)


def test_packing_takes_few_bytes_per_token():
    rng = np.random.default_rng(0)
    docs = [rng.integers(2, 60_000, 1000) for _ in range(200)]
    tracemalloc.start()
    packed = pack_documents(docs, 512, bos_id=BOS, eos_id=EOS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(packed.stream)  # two for each document, two for the stream
    assert packed.stream.tolist() == [token for token, _ in reference_stream(docs)]


def test_tokenize_documents_encodes_in_order_and_without_special_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["abab"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4)
    texts = [f"document {i} é" for i in range(300)] + [""]
    encoded = list(tokenize_documents(iter(texts), tokenizer))
    assert [ids.tolist() for ids in encoded] == [backend.encode(text).ids for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded) and len(encoded[-1]) == 0
