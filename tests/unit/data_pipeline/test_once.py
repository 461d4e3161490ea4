"""Every token of a folder, once, in rows that are always the same."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.once import OnceThrough
from data_pipeline.shards import TokenReader
from data_pipeline.shards.writer import write_token_shards
from data_pipeline.synthetic import Alphabet

LENGTHS = [5, 1, 30, 2, 9]
IGNORED = -100


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    Alphabet(64).save_tokenizer(tmp_path / "made.json")
    documents = [
        (str(number), [*(10 + number for _ in range(length - 1)), 0])
        for number, length in enumerate(LENGTHS)
    ]
    out = tmp_path / "shards"
    write_token_shards(documents, tmp_path / "made.json", out, tokens_per_shard=7, extra={})
    return out


@pytest.mark.parametrize("seq_len", [1, 4, 8, 47, 100])
def test_each_token_is_read_and_predicted_once(shards: Path, seq_len: int) -> None:
    once = OnceThrough(str(shards), seq_len)
    reader = TokenReader(once.manifest)
    tokens = np.concatenate([reader.read(n, 0, 99) for n in range(len(LENGTHS))])
    assert once.tokens == len(tokens) == sum(LENGTHS)
    # One more row than there are.
    batch = once.read(range(once.rows + 1))
    assert batch.tokens.shape == (once.rows + 1, seq_len)
    np.testing.assert_array_equal(batch.tokens.ravel()[: len(tokens)], tokens)
    is_first = np.zeros(len(tokens), bool)
    is_first[np.cumsum([0, *LENGTHS[:-1]])] = True
    expected = np.append(np.where(is_first[1:], IGNORED, tokens[1:].astype(np.int64)), IGNORED)
    np.testing.assert_array_equal(batch.labels.ravel()[: len(tokens)], expected)
    assert (batch.labels.ravel()[len(tokens) :] == IGNORED).all()
    starts = np.flatnonzero(batch.position.ravel() == 0)
    wanted = np.flatnonzero(is_first | (np.arange(len(tokens)) % seq_len == 0))
    np.testing.assert_array_equal(starts[starts < len(tokens)], wanted)


def test_rows_read_one_by_one_are_those_of_all_and_a_limit_takes_the_first(shards: Path) -> None:
    once = OnceThrough(str(shards), 8)
    whole = once.read(range(6))
    for row in range(6):
        np.testing.assert_array_equal(once.read([row]).tokens[0], whole.tokens[row])
    limited = OnceThrough(str(shards), 8, most_tokens=23)
    assert (limited.rows, limited.tokens) == (2, 16)
    np.testing.assert_array_equal(limited.read(range(2)).labels, whole.labels[:2])
    assert (limited.read([2]).labels == IGNORED).all()


def test_empty_documents_are_refused(tmp_path: Path) -> None:
    Alphabet(64).save_tokenizer(tmp_path / "made.json")
    write_token_shards([("a", [0]), ("b", [0])], tmp_path / "made.json", tmp_path / "s", extra={})
    with pytest.raises(DataError, match="2 documents are empty"):
        OnceThrough(str(tmp_path / "s"), 8)
