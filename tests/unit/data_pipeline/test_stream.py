from collections import Counter

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import write_shards
from data_pipeline.sources import phases_of, shares_of
from data_pipeline.stream import Source, TokenStream, WeightsFrom
from data_pipeline.tokenize import train_tokenizer

DOCUMENTS = [(str(i), "abcdefgh"[: i % 6]) for i in range(12)]


@pytest.fixture
def root(tmp_path):
    train_tokenizer([], 300, tmp_path / "tokenizer.json")
    write_shards(DOCUMENTS, tmp_path / "tokenizer.json", tmp_path / "a", extra={})
    return tmp_path


def test_batches_are_int64_and_a_rank_may_have_no_rows(root):
    stream = TokenStream([Source(str(root / "a"))], 16, seed=1)
    plan = stream.next_batch(2)
    batch = stream.read(plan, [1])
    assert batch.tokens.dtype == batch.labels.dtype == batch.position.dtype == np.int64
    assert batch.tokens.shape == batch.labels.shape == batch.position.shape == (1, 16)
    assert stream.read(plan, []).tokens.shape == (0, 16)
    assert (stream.vocab_size, stream.eos_id) == (257, 0)
    assert stream.total_tokens == sum(len(text) + 1 for _, text in DOCUMENTS)


def test_seed_and_epoch_change_the_order(root):
    def epochs(seed):
        stream = TokenStream([Source(str(root / "a"))], 42, seed)
        return [stream.read(stream.next_batch(1), [0]).tokens.tolist() for _ in range(2)]

    first, second = epochs(1)
    assert first != second
    assert epochs(2)[0] != first
    assert epochs(1) == [first, second]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"weight": -1}, "source web: weight=-1 .* above 0"),
        ({"weight": float("nan")}, "source web: weight=nan .* above 0"),
        ({"weight": float("inf")}, "source web: weight=inf .* above 0"),
        ({"epochs": 0}, "epochs=0 is not allowed"),
        ({"max_epochs": float("nan")}, "max_epochs=nan is not allowed"),
        ({"epochs": 2, "weight": 1}, "leave out weight and max_epochs"),
        ({"epochs": 2, "max_epochs": 3}, "leave out weight and max_epochs"),
        ({"max_epochs": 3, "growing": True}, "a growing source has no end yet"),
        ({"upsample": {0: 2}}, r"upsample={0: 2} is not allowed"),
        ({"upsample": {9: 0.0001}}, "at most 3 decimals"),
        ({"upsample": {9: 1001}}, "up to 1000"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(settings, problem):
    with pytest.raises(DataError, match=problem):
        Source("web", **settings)


@pytest.mark.parametrize(
    ("sources", "curriculum", "problem"),
    [
        ([{"weight": 0}, {}], [], r"source web: weight=0 is not above 0 in any phase"),
        ([{"epochs": 2}, {}], [], "web and weights for others: give epochs for every source"),
        ([{"epochs": 2}, {"epochs": 1}], [(5, {"web": 1})], "web and a curriculum"),
        ([{}, {}], [(5, {"books": 1})], "token 5 names 'books', .* none of .*: web, wiki"),
        ([{}, {}], [(5, {"web": 1}), (5, {"web": 2})], "begins at token 5, and .* before at 5"),
        ([{}, {}], [(0, {"web": 1})], "begins at token 0, .* the first one above 0"),
        ([{}, {}], [(5, {"web": float("nan")})], "token 5 has the weight nan for web"),
        ([{}, {}], [(5, {"web": 0, "wiki": 0})], "from token 5 on, all weights are 0"),
        ([{}, {"name": "web"}], [(5, {"web": 1})], r"one name \(web, web\); give each a `name`"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(sources, curriculum, problem):
    named = [
        Source(f"data/{path}", **settings)
        for path, settings in zip(("web", "wiki"), sources, strict=True)
    ]
    with pytest.raises(DataError, match=problem.replace("source web", "source data/web")):
        phases_of(named, [WeightsFrom(*phase) for phase in curriculum])


def test_shares_are_whole_and_sum_up():
    """GPT-3's own weights sum to 101 %: they are relative."""
    shares = shares_of([60, 22, 8, 8, 3], 10**9)
    assert sum(shares) == 10**9
    assert shares == pytest.approx([10**9 * w / 101 for w in (60, 22, 8, 8, 3)], abs=1)
    assert shares_of([1, 1e-15, 0], 100) == [99, 1, 0]
    assert shares_of([1 / 3, 1 / 3, 1 / 3], 100) == [34, 33, 33]


def test_a_stream_says_what_it_will_consist_of_and_when_it_is_used_up(root):
    write_shards(DOCUMENTS[6:], root / "tokenizer.json", root / "b", extra={})
    sizes = [sum(len(text) + 1 for _, text in some) for some in (DOCUMENTS, DOCUMENTS[6:])]
    sources = [Source(str(root / "a"), epochs=0.5), Source(str(root / "b"), epochs=3)]
    stream = TokenStream(sources, 1, seed=1)
    uses = stream.outlook(10**9)
    assert [(use.name, use.size) for use in uses] == [("a", sizes[0]), ("b", sizes[1])]
    assert [use.epochs for use in uses] == [0.5, 3]
    found = Counter()
    for _ in range(sum(use.tokens for use in uses)):
        found += Counter(stream.next_batch(1).pieces[:, 0].tolist())
    with pytest.raises(DataError, match=r"a after 0.5 epochs, b after 3 epochs\. Lower train"):
        stream.next_batch(6)
    assert found[1] == 3 * sizes[1]
    assert 0 <= found[0] - sizes[0] / 2 < 6


def test_a_checkpoint_with_another_order_is_refused(root):
    stream = TokenStream([Source(str(root / "a"))], 16, seed=1)
    state = stream.state_dict()
    del state["order"]
    with pytest.raises(DataError, match="made by an older farspan"):
        stream.load_state_dict(state)


def test_sources_of_two_tokenizers_are_refused(root):
    train_tokenizer(["other other"], 300, root / "other.json")
    other = write_shards(DOCUMENTS, root / "other.json", root / "b", extra={})
    with pytest.raises(DataError, match=rf"{root}/b .*{other.tokenizer_sha256}.*{root}/a .*sha256"):
        TokenStream([Source(str(root / "a")), Source(str(root / "b"))], 16, seed=1)


def test_a_source_with_nothing_to_predict_is_refused(root):
    write_shards([("1", ""), ("2", "")], root / "tokenizer.json", root / "empty", extra={})
    with pytest.raises(DataError, match="its 2 documents are empty"):
        TokenStream([Source(str(root / "empty"))], 16, seed=1)
    with pytest.raises(DataError, match="name at least one folder"):
        TokenStream([], 16, seed=1)


def test_resuming_on_other_data_or_another_seed_is_refused(root):
    state = TokenStream([Source(str(root / "a"))], 16, seed=1).state_dict()
    with pytest.raises(DataError, match=r"data\.seed=2, but the checkpoint .* seed 1"):
        TokenStream([Source(str(root / "a"))], 16, seed=2).load_state_dict(state)
    write_shards(DOCUMENTS[:-1], root / "tokenizer.json", root / "a", extra={})
    with pytest.raises(DataError, match="not those the checkpoint was trained on"):
        TokenStream([Source(str(root / "a"))], 16, seed=1).load_state_dict(state)
