"""Lanes against the stream as it comes: the same rows, and what goes on where."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.lanes import in_stream_order
from data_pipeline.shards import write_shards
from data_pipeline.stream import Source, TokenStream
from data_pipeline.tokenize import train_tokenizer

ROWS, SEQUENCES, SEQ_LEN = 3, 2, 8
# Of 1 to 60 tokens.
LENGTHS = [59, 3, 0, 20, 7, 7, 31, 12, 1, 40]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    train_tokenizer([chr(c) for c in range(97, 123)], 300, root / "tokenizer.json")
    documents = [(str(i), chr(97 + i) * n) for i, n in enumerate(LENGTHS)]
    write_shards(documents, root / "tokenizer.json", root / "a", extra={})
    return [Source(str(root / "a"))]


def open_lanes(sources, rows=ROWS, seq_len=SEQ_LEN):
    return TokenStream(sources, seq_len, seed=3, lane_rows=rows)


def test_a_block_has_the_rows_of_the_stream_those_of_a_lane_one_after_the_other(sources):
    plain, lanes = open_lanes(sources, rows=1), open_lanes(sources)
    for _ in range(5):
        block = plain.read(plain.next_batch(ROWS * SEQUENCES), range(ROWS * SEQUENCES))
        for batch in range(ROWS):
            assert lanes.tokens == plain.tokens - (ROWS - batch) * SEQUENCES * SEQ_LEN
            plan = lanes.next_batch(SEQUENCES)
            read = lanes.read(plan, range(SEQUENCES))
            for name in ("tokens", "labels", "position"):
                expected = getattr(block, name)[batch::ROWS]
                assert np.array_equal(getattr(read, name), expected)
        assert lanes.tokens == plain.tokens


def test_a_row_continues_where_the_labels_of_the_one_before_say_so(sources):
    lanes = open_lanes(sources)
    seen = set()
    for _ in range(6):
        before = np.full(SEQUENCES, -100)
        for batch in range(ROWS):
            read = lanes.read(lanes.next_batch(SEQUENCES), range(SEQUENCES))
            goes_on = before != -100
            assert np.array_equal(read.continues, goes_on)
            assert np.array_equal(before[goes_on], read.tokens[goes_on, 0])
            # The last row of a lane has no next one that remembers it.
            before = read.labels[:, -1] if batch < ROWS - 1 else before * 0 - 100
            assert np.array_equal(read.is_continued, before != -100)
            seen |= {*read.continues.tolist()}
    assert seen == {True, False}


@pytest.mark.parametrize("done", range(2 * ROWS))
def test_a_state_within_a_block_goes_on_with_its_next_batch(sources, done):
    whole, stopped = open_lanes(sources), open_lanes(sources)
    for _ in range(done):
        whole.next_batch(SEQUENCES)
        stopped.next_batch(SEQUENCES)
    resumed = open_lanes(sources)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()
    assert resumed.tokens == stopped.tokens
    for _ in range(2 * ROWS):
        expected, plan = whole.next_batch(SEQUENCES), resumed.next_batch(SEQUENCES)
        assert np.array_equal(plan.pieces, expected.pieces)
        assert np.array_equal(plan.row_starts, expected.row_starts)
        assert np.array_equal(plan.continues, expected.continues)


def test_weights_change_only_where_lanes_end(sources):
    def open_weighted(weight):
        two = [replace(sources[0], name="a"), replace(sources[0], name="b", weight=weight)]
        return TokenStream(two, SEQ_LEN, seed=3, lane_rows=ROWS)

    stream = open_weighted(1.0)
    for batch in range(ROWS):
        state = stream.state_dict()
        if batch:
            with pytest.raises(DataError, match=f"where lanes end .*{ROWS - batch} batches from"):
                open_weighted(9.0).load_state_dict(state)
        open_weighted(1.0).load_state_dict(state)
        stream.next_batch(10)
    other = open_weighted(9.0)
    other.load_state_dict(stream.state_dict())
    assert other.tokens == stream.tokens


def test_what_a_block_has_delivered_is_known_by_source(sources):
    lanes = open_lanes(sources)
    lanes.next_batch(SEQUENCES)
    state = lanes.state_dict()["lanes"]
    assert state["delivered"] == [SEQUENCES * SEQ_LEN]


def test_pieces_of_a_block_are_put_into_the_order_of_the_stream(sources):
    plain, lanes = open_lanes(sources, rows=1), open_lanes(sources)
    block = plain.next_batch(ROWS * SEQUENCES)
    batches = [lanes.next_batch(SEQUENCES).pieces for _ in range(ROWS)]
    assert np.array_equal(in_stream_order(batches, SEQ_LEN), block.pieces)
    first, second = (batch for batch in batches[:2])
    part = in_stream_order([first, second], SEQ_LEN)
    missing = {tuple(piece) for piece in batches[2].tolist()}
    expected = [piece for piece in block.pieces.tolist() if tuple(piece) not in missing]
    assert part.tolist() == expected


def test_lanes_change_only_where_they_end(sources):
    lanes = open_lanes(sources)
    lanes.next_batch(SEQUENCES)
    state = lanes.state_dict()
    for rows, seq_len in ((ROWS + 1, SEQ_LEN), (ROWS, 2 * SEQ_LEN), (1, SEQ_LEN)):
        with pytest.raises(DataError, match="can change where lanes end, 2 batches from here"):
            open_lanes(sources, rows, seq_len).load_state_dict(state)
    with pytest.raises(DataError, match="3 side by side"):
        lanes.next_batch(3)
    for _ in range(ROWS - 1):
        lanes.next_batch(SEQUENCES)
    other = open_lanes(sources, 5, 4)
    other.load_state_dict(lanes.state_dict())
    assert other.tokens == lanes.tokens
    other.next_batch(3)
