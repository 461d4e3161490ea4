"""Cross-entropy by how much a token was predicted from: whether more context helps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream import Source, TokenStream
from pretrain.data import cache_of
from pretrain.errors import UserError
from pretrain.evals.request import Request
from pretrain.evals.sharded import ShardedModel
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.run_dir import RunDirectory


@dataclass(frozen=True)
class Bucket:
    """Tokens that were predicted from `first` to `last` tokens before them.

    Attributes:
        loss: mean cross-entropy in nats.
        tokens: how many were predicted.
    """

    first: int
    last: int
    loss: float
    tokens: int


def loss_by_position(
    model: ShardedModel, run: RunDirectory, request: Request
) -> tuple[Bucket, ...]:
    """Of the documents of `request.shards`, packed into rows of the longest length. Collective.

    As many rows as samples are read, but none twice. Buckets end at powers of two; those without a
    token are left out.

    Raises:
        DataError: the shards are missing or damaged.
        UserError: they are of another tokenizer than the run's, or have less tokens than a row.
    """
    assert request.shards is not None
    length = max(request.lengths)
    cache = cache_of(model.config.data)
    stream = TokenStream([Source(request.shards)], length, request.seed, cache=cache)
    if stream.tokenizer.read_bytes() != run.tokenizer.read_bytes():
        raise UserError(
            f"--shards {request.shards} has another tokenizer than {run.tokenizer}: give shards of "
            "the run's, as `farspan data tokenize --like` makes them"
        )
    if stream.total_tokens < length:
        raise UserError(
            f"--shards {request.shards} has {stream.total_tokens:,} tokens, less than one row of "
            f"the longest of --lengths, {length:,}: give more documents, or shorter lengths"
        )
    rows = min(request.samples, stream.total_tokens // length)
    loss, seen = [], []
    while rows:
        count = min(rows, model.rows_at_a_time(length))
        batch = stream.read(stream.next_batch(count), range(count))
        loss.append(model.score(batch.tokens, batch.labels, batch.position).loss)
        seen.append(batch.position[batch.labels != IGNORED] + 1)
        rows -= count
    return by_powers_of_two(np.concatenate(seen), np.concatenate(loss))


def by_powers_of_two(seen: NDArray[np.int64], loss: NDArray[np.float64]) -> tuple[Bucket, ...]:
    """Losses by the number of tokens that each was predicted from, at least 1."""
    power = np.frexp(seen)[1] - 1
    tokens, total = np.bincount(power), np.bincount(power, weights=loss)
    return tuple(
        Bucket(1 << n, (2 << n) - 1, float(total[n] / tokens[n]), int(tokens[n]))
        for n in np.flatnonzero(tokens).tolist()
    )
