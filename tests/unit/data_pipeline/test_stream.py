import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import write_shards
from data_pipeline.stream import Source, TokenStream
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


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(DataError, match=r"source web: weight=.* above 0"):
        Source("web", weight)


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
