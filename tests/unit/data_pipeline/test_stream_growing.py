"""A stream over shards that are still being written delivers what it would deliver afterwards."""

from contextlib import suppress

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import growth, write_shards
from data_pipeline.stream import Source, TokenStream
from data_pipeline.tokenize import train_tokenizer

DOCUMENTS = [(str(i), f"document {i} " * (1 + i % 7)) for i in range(60)]


class Killed(BaseException):
    """What nobody handles."""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """`growing` has the first shards, `whole` all; waiting for more has them written."""
    monkeypatch.setattr("data_pipeline.shards.writer.DOCUMENTS_PER_ENCODING", 5)
    train_tokenizer([text for _, text in DOCUMENTS], 300, tmp_path / "tokenizer.json")

    def write(folder, documents):
        write_shards(documents, tmp_path / "tokenizer.json", folder, tokens_per_shard=60, extra={})

    def killed():
        yield from DOCUMENTS[:30]
        raise Killed

    write(tmp_path / "whole", DOCUMENTS)
    with suppress(Killed):
        write(tmp_path / "growing", killed())
    monkeypatch.setattr(growth, "sleep", lambda _: write(tmp_path / "growing", DOCUMENTS))
    return tmp_path


def rows(stream, count, beat=lambda: None):
    return np.concatenate(
        [stream.read(stream.next_batch(1, beat), [0]).tokens for _ in range(count)]
    )


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5]])
def test_the_order_does_not_depend_on_when_shards_are_written(root, weights):
    def sources(name):
        paths = [root / name, root / "whole"]
        return [
            Source(str(path), weight, growing=path.name == name)
            for path, weight in zip(paths, weights, strict=False)
        ]

    finished = TokenStream(sources("whole")[:1] + sources("growing")[1:], 16, 1, shuffle_shards=2)
    running = TokenStream(sources("growing"), 16, 1, shuffle_shards=2)
    count = 2 * finished.total_tokens // 16
    expected, beats = rows(finished, count), []
    assert np.array_equal(rows(running, 5), expected[:5])
    assert len(running.state_dict()["data"]) == len(weights)
    early = running.state_dict()
    assert early["shards"][0] == 2
    assert np.array_equal(rows(running, count - 5, lambda: beats.append(1)), expected[5:])
    assert beats

    resumed = TokenStream(sources("growing"), 16, 1, shuffle_shards=2)
    resumed.load_state_dict(early)
    assert resumed.state_dict() == early
    assert np.array_equal(rows(resumed, count - 5), expected[5:])
    assert resumed.state_dict() == running.state_dict()


def test_other_shards_than_those_begun_are_refused(root):
    source = Source(str(root / "growing"), growing=True)
    stream = TokenStream([source], 16, 1, shuffle_shards=2)
    rows(stream, 5)
    others = [("x", "another one"), *DOCUMENTS[1:]]
    write_shards(others, root / "tokenizer.json", root / "growing", tokens_per_shard=60, extra={})
    other = TokenStream([source], 16, 1, shuffle_shards=2)
    with pytest.raises(DataError, match="not those the checkpoint was trained on"):
        other.load_state_dict(stream.state_dict())
