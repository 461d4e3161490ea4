"""The endless order of documents drawn from weighted sources; a few integers resume it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.hashing import mix64

FEISTEL_ROUNDS = 6
DOCUMENTS_PER_CHUNK = 1024


@dataclass(frozen=True)
class Source:
    """A folder of shards and its share of the tokens, relative to the other sources'."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(
                f"source {self.path}: weight={self.weight} is not allowed: weights are finite and "
                "above 0. To leave a source out, remove it from the list"
            )


@dataclass
class Cursor:
    """How far one source has been read.

    Attributes:
        epoch: passes over the source completed.
        documents: documents begun in this epoch.
        offset: tokens already taken from the document begun last; 0 when it is finished.
        tokens: tokens taken in all epochs.
    """

    epoch: int = 0
    documents: int = 0
    offset: int = 0
    tokens: int = 0


def permute(index: NDArray[np.int64], size: int, key: Sequence[int]) -> NDArray[np.int64]:
    """The places of `index` in the pseudorandom permutation of [0, size) that `key` names.

    A Feistel network over the next power of 4, walked along its cycles until it lands below `size`
    (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, section 3): no memory.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    place = index.astype(np.uint64)
    outside = np.ones(len(place), bool)
    while outside.any():
        left, right = place[outside] >> half, place[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        place[outside] = left << half | right
        outside = place >= size
    return place.astype(np.int64)


class Mixture:
    """Documents of all sources laid end to end, taken piece by piece.

    Every epoch of a source visits each of its documents once, in an order of its own. The next
    document comes from the source whose tokens lag furthest behind its weight, so that no source
    ever strays from its share by more than a document per other source.
    """

    def __init__(
        self, lengths: Sequence[NDArray[np.int64]], weights: Sequence[float], seed: int
    ) -> None:
        self._lengths = lengths
        self._shares = [weight / math.fsum(weights) for weight in weights]
        self._seed = seed
        self.load_state_dict([asdict(Cursor()) for _ in lengths])

    def state_dict(self) -> list[dict[str, int]]:
        return [asdict(cursor) for cursor in self._cursors]

    def load_state_dict(self, state: Sequence[dict[str, int]]) -> None:
        self._cursors = [Cursor(**cursor) for cursor in state]
        self._upcoming = []
        self._open: tuple[int, int, int] | None = None
        for source, cursor in enumerate(self._cursors):
            is_open = cursor.offset > 0
            upcoming = self._order(source, cursor.epoch, cursor.documents - is_open)
            if is_open:
                self._open = source, *next(upcoming)
            self._upcoming.append(upcoming)

    def take(self, limit: int) -> tuple[int, int, int, int]:
        """The next piece, of at most `limit` tokens: (source, document, start, stop)."""
        if self._open is None:
            source = self._furthest_behind()
            self._open = source, *self._begin(source)
        source, document, length = self._open
        cursor = self._cursors[source]
        start = cursor.offset
        stop = min(start + limit, length)
        cursor.tokens += stop - start
        if stop == length:
            cursor.offset = 0
            self._open = None
        else:
            cursor.offset = stop
        return source, document, start, stop

    def _furthest_behind(self) -> int:
        total = sum(cursor.tokens for cursor in self._cursors)
        deficits = [
            share * total - cursor.tokens
            for share, cursor in zip(self._shares, self._cursors, strict=True)
        ]
        return deficits.index(max(deficits))

    def _begin(self, source: int) -> tuple[int, int]:
        cursor = self._cursors[source]
        if cursor.documents == len(self._lengths[source]):
            cursor.epoch += 1
            cursor.documents = 0
        cursor.documents += 1
        return next(self._upcoming[source])

    def _order(self, source: int, epoch: int, begun: int) -> Iterator[tuple[int, int]]:
        """(document, length) from after the `begun` first documents of `epoch`, for ever."""
        lengths = self._lengths[source]
        while True:
            for first in range(begun, len(lengths), DOCUMENTS_PER_CHUNK):
                index = np.arange(first, min(first + DOCUMENTS_PER_CHUNK, len(lengths)))
                documents = permute(index, len(lengths), (self._seed, source, epoch))
                yield from zip(documents.tolist(), lengths[documents].tolist(), strict=True)
            epoch, begun = epoch + 1, 0
