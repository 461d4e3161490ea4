"""The mixture against a plain one, in rows of any length, killed at any step."""

from collections import Counter
from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.mixture import Mixture
from data_pipeline.order import SourceOrder, Visits, permuted
from data_pipeline.sources import Source, WeightsFrom
from tests.unit.data_pipeline import plain_order
from tests.unit.data_pipeline.plain_order import listed

seeds = st.integers(0, 2**32)
lengths = st.integers(1, 40)
shards = st.lists(st.lists(lengths, min_size=1, max_size=5), min_size=1, max_size=5)
times = st.integers(1, 5000).map(lambda thousandths: thousandths / 1000)
upsample = st.dictionaries(st.integers(1, 40), times, max_size=2)
epochs = st.integers(1, 400).map(lambda hundredths: hundredths / 100)
weights = st.floats(0.01, 100)
steps = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 70), st.booleans()), min_size=1, max_size=6
)


@st.composite
def mixtures(draw):
    """Sources, their shards, and a curriculum."""
    count = draw(st.integers(1, 4))
    of = [draw(shards) for _ in range(count)]
    if draw(st.booleans()):
        sources = [
            Source(f"s{i}", epochs=draw(epochs), upsample=draw(upsample)) for i in range(count)
        ]
        return sources, of, []
    sources = []
    for i in range(count):
        growing = draw(st.booleans())
        limit = None if growing else draw(st.none() | epochs)
        sources.append(
            Source(
                f"s{i}", draw(weights), max_epochs=limit, upsample=draw(upsample), growing=growing
            )
        )
    starts = sorted(draw(st.sets(st.integers(1, 600), max_size=3)))
    names = st.sampled_from([source.name for source in sources])
    curriculum = [
        WeightsFrom(first, draw(st.dictionaries(names, weights, max_size=count)))
        for first in starts
    ]
    return sources, of, curriculum


def tokens_of(pieces):
    return [
        (source, document, token)
        for source, document, start, stop in np.concatenate(pieces).tolist()
        for token in range(start, stop)
    ]


@given(size=st.integers(1, 3000), key=st.tuples(seeds, st.integers(0, 9), st.integers(0, 9)))
@settings(max_examples=40, deadline=None)
def test_permutation_is_that_of_the_reference_from_any_place_on(size, key):
    whole = permuted(0, size, size, key)
    assert whole.tolist() == plain_order.permutation(size, key)
    assert sorted(whole.tolist()) == list(range(size))
    assert np.array_equal(permuted(size // 3, size, size, key), whole[size // 3 :])


@given(mixture=mixtures(), seed=seeds, width=st.integers(1, 4), steps=steps)
@settings(max_examples=120, deadline=None)
def test_every_token_comes_when_the_reference_says_whatever_happens(mixture, seed, width, steps):
    sources, of, curriculum = mixture

    def new():
        documents = [listed(each) for each in of]
        return Mixture(documents, sources, seed, shuffle_shards=width, curriculum=curriculum)

    expected = list(islice(plain_order.stream(sources, of, seed, width, curriculum), 900))
    running, found = new(), []
    for rows, seq_len, is_killed in cycle(steps):
        if len(found) == len(expected):
            break
        if len(found) + rows * seq_len > len(expected):
            rows, seq_len = 1, 1
        pieces, row_starts = running.take(rows, seq_len)
        filled = np.diff(np.append(0, np.cumsum(pieces[:, 3] - pieces[:, 2]))[row_starts])
        assert filled.tolist() == [seq_len] * rows
        found += tokens_of([pieces])
        assert running.tokens == len(found)
        if is_killed:
            killed, running = running, new()
            running.load_state_dict(killed.state_dict())
            assert running.state_dict() == killed.state_dict()
        assert found == expected[: len(found)]
    if len(expected) < 900:
        with pytest.raises(DataError, match=f"used up after {len(expected)} tokens"):
            running.take(1, 1)
        outlook = running.outlook(10**6)
        longest = max(n for shards in of for shard in shards for n in shard)
        counts = Counter(source for source, _, _ in expected)
        assert all(abs(n - counts[i]) <= longest * len(sources) + 1 for i, n in enumerate(outlook))


@given(of=shards, rule=upsample, seed=seeds, width=st.integers(1, 4), growing=st.booleans())
@settings(max_examples=60, deadline=None)
def test_epochs_visit_each_document_as_often_as_its_length_says(of, rule, seed, width, growing):
    source = Source("s", upsample=rule)
    documents = listed(of)
    order = SourceOrder(documents, (seed, 0), width, Visits(source.times), growing, lambda: None)
    total = np.zeros(len(documents.lengths), np.int64)
    for epoch in range(4):
        window = 0
        while (found := order.upcoming(epoch, window, 0, 10**6)) is not None:
            np.add.at(total, found, 1)
            window += 1
        assert window == -(-len(of) // width)
        assert order.tokens_of_epochs(epoch + 1) == (total * documents.lengths).sum()
        for length, visits in zip(documents.lengths.tolist(), total.tolist(), strict=True):
            passed = [least for least in rule if length >= least]
            wanted = (epoch + 1) * (rule[max(passed)] if passed else 1)
            assert abs(visits - wanted) < 1


@given(seed=seeds, several=st.lists(weights, min_size=2, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_source_strays_from_its_weight(seed, several, data):
    of = [data.draw(shards) for _ in several]
    sources = [Source(f"s{i}", weight) for i, weight in enumerate(several)]
    mixture = Mixture([listed(each) for each in of], sources, seed)
    taken = np.zeros(len(several))
    shares = np.array(several) / sum(several)
    longest = max(n for shards in of for shard in shards for n in shard)
    for _ in range(200):
        pieces, _ = mixture.take(1, 7)
        np.add.at(taken, pieces[:, 0], pieces[:, 3] - pieces[:, 2])
        assert np.abs(shares * taken.sum() - taken).max() <= longest * (len(several) - 1) + 1e-3


@given(seed=seeds, before=weights, after=weights, at=st.integers(1, 2000))
@settings(max_examples=30, deadline=None)
def test_a_change_of_weights_makes_no_source_catch_up(seed, before, after, at):
    """Neither one of the curriculum, nor one at a restart."""
    of = [[[9, 4, 17, 2]], [[5, 11, 3]]]

    def new(weight, *curriculum):
        sources = [Source("a", weight), Source("b", 1.0)]
        return Mixture([listed(each) for each in of], sources, seed, curriculum=curriculum)

    planned, restarted = new(before, WeightsFrom(at, {"a": after})), new(before)
    restarted.take(at, 1)
    going_on = new(after)
    going_on.load_state_dict(restarted.state_dict())
    planned.take(at, 1)
    taken = np.zeros(2)
    for _ in range(150):
        one, other = planned.take(1, 4)[0], going_on.take(1, 4)[0]
        assert np.array_equal(one, other)
        np.add.at(taken, one[:, 0], one[:, 3] - one[:, 2])
        share = after / (after + 1)
        assert abs(taken[0] - share * taken.sum()) <= 2 * 17 + 1
