"""The stream against a plain list of documents: nothing lost, nothing twice."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.lanes import in_stream_order
from data_pipeline.order import permuted
from data_pipeline.shards import TokenReader, load_manifest, write_shards
from data_pipeline.stream import Source, TokenStream
from data_pipeline.tokenize import train_tokenizer

seeds = st.integers(0, 2**32)
batch_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def sources():
    """Two sources of 30 and 13 documents, of 1 (empty) to about 60 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        train_tokenizer([chr(c) for c in range(97, 123)], 300, root / "tokenizer.json")
        for name, first, count in (("a", 0, 30), ("b", 100, 13)):
            documents = [(str(i), f"{i} " * (i * 7 % 15)) for i in range(first, first + count)]
            write_shards(
                documents, root / "tokenizer.json", root / name, tokens_per_shard=150, extra={}
            )
        yield [Source(str(root / "a"), 2.0), Source(str(root / "b"), 1.0)]


def deliver(stream, batches):
    """Rows of (tokens, labels, position) of all batches, end to end."""
    read = [stream.read(stream.next_batch(size), range(size)) for size in batches]
    return [
        np.concatenate([getattr(batch, name).ravel() for batch in read])
        for name in ("tokens", "labels", "position")
    ]


def test_permutation_is_uniform():
    places = np.array([permuted(0, 12, 12, (seed, 0, 0)) for seed in range(6000)])
    counts = np.array([np.bincount(column, minlength=12) for column in places.T])
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 121 + 5 * np.sqrt(2 * 121)


@given(seed=seeds, seq_len=st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_an_epoch_delivers_and_predicts_every_token_once(sources, seed, seq_len):
    stream = TokenStream(sources[:1], seq_len, seed)
    rows = stream.total_tokens * 2 // seq_len + 1
    tokens, labels, position = deliver(stream, [rows])
    reader = TokenReader(load_manifest(sources[0].path))
    documents = Counter(
        tuple(reader.read(i, 0, length).tolist()) for i, length in enumerate(reader.lengths)
    )
    predicted = labels != -100
    assert np.array_equal(labels[:-1][predicted[:-1]], tokens[1:][predicted[:-1]])
    for epoch in range(2):
        span = slice(epoch * stream.total_tokens, (epoch + 1) * stream.total_tokens)
        ends = np.flatnonzero(~predicted[span]) + 1
        delivered = np.split(tokens[span], ends[:-1])
        assert Counter(tuple(document.tolist()) for document in delivered) == documents
        begins_row = np.arange(len(tokens))[span] % seq_len == 0
        begins_document = np.isin(np.arange(stream.total_tokens), [0, *ends])
        assert np.array_equal(position[span] == 0, begins_row | begins_document)
    steps = np.diff(position)
    assert np.all((steps == 1) | (position[1:] == 0))


@given(seed=seeds, seq_len=st.integers(1, 40), batches=batch_sizes, ranks=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_ranks_and_batch_sizes_do_not_change_the_order(sources, seed, seq_len, batches, ranks):
    one, split = (TokenStream(sources, seq_len, seed) for _ in range(2))
    whole = one.read(one.next_batch(sum(batches)), range(sum(batches)))
    first = 0
    for size in batches:
        plan = split.next_batch(size)
        for rank in range(ranks):
            rows = range(rank, size, ranks)
            batch = split.read(plan, rows)
            for name in ("tokens", "labels", "position"):
                expected = getattr(whole, name)[first + rank : first + size : ranks]
                assert np.array_equal(getattr(batch, name), expected)
        first += size


@given(seed=seeds, lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)), batches=batch_sizes)
@settings(max_examples=25, deadline=None)
def test_resuming_goes_on_at_the_next_token_in_rows_of_any_length(sources, seed, lengths, batches):
    stream = TokenStream(sources, lengths[0], seed)
    deliver(stream, batches)
    resumed = TokenStream(sources, lengths[1], seed)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.state_dict() == stream.state_dict()
    size = 40 * lengths[0] * lengths[1]
    (expected, *_), (tokens, *_) = (
        deliver(each, [size // each.seq_len]) for each in (stream, resumed)
    )
    assert np.array_equal(tokens, expected)
    assert resumed.state_dict() == stream.state_dict()


@given(
    seed=seeds,
    seq_len=st.integers(1, 40),
    rows=st.integers(1, 5),
    sequences=st.integers(1, 4),
    stops=st.sets(st.integers(0, 11)),
)
@settings(max_examples=25, deadline=None)
def test_lanes_deal_out_the_rows_of_the_stream_however_often_they_resume(
    sources, seed, seq_len, rows, sequences, stops
):
    plain = TokenStream(sources, seq_len, seed)
    lanes = TokenStream(sources, seq_len, seed, lane_rows=rows)
    block = []
    for batch in range(12 // rows * rows):
        if batch in stops:
            state = lanes.state_dict()
            lanes = TokenStream(sources, seq_len, seed, lane_rows=rows)
            lanes.load_state_dict(state)
        block.append(lanes.next_batch(sequences).pieces)
        if len(block) == rows:
            expected = plain.next_batch(rows * sequences).pieces
            assert np.array_equal(in_stream_order(block, seq_len), expected)
            block = []
    assert lanes.state_dict() == plain.state_dict()
