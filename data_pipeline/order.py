"""The order of one source's documents, epoch after epoch: found anywhere, without a replay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Documents(Protocol):
    """The documents of a source, shard by shard."""

    @property
    def lengths(self) -> Ints:
        """[documents], in tokens."""

    @property
    def shard_documents(self) -> Ints:
        """[shards], how many documents each has."""

    def wait_for(self, shards: int, beat: Callable[[], None]) -> None:
        """Return when so many shards are listed, or all that there will be; `beat` meanwhile."""


class Visits:
    """How often an epoch visits a document, by its length.

    Times may be fractions: of 2.5, an epoch visits every other document three times, the next epoch
    the others. Of n documents in a row E epochs make floor or ceil of E * n * times visits, and of
    each document floor or ceil of E * times.

    Args:
        upsample: times by the least number of tokens; documents shorter than all are visited once.
    """

    def __init__(self, upsample: Mapping[int, Fraction]) -> None:
        steps = sorted(upsample.items())
        self.is_plain = not steps
        self._least = np.array([least for least, _ in steps], np.int64)
        times = [Fraction(1), *(times for _, times in steps)]
        self._numerator = np.array([each.numerator for each in times], np.int64)
        self._denominator = np.array([each.denominator for each in times], np.int64)

    def buckets(self, lengths: Ints) -> Ints:
        """0 for documents shorter than all thresholds, then one for each of these."""
        return np.searchsorted(self._least, lengths, side="right")

    def count(self, lengths: Ints) -> Ints:
        """[buckets], the documents in each."""
        return np.bincount(self.buckets(lengths), minlength=len(self._numerator))

    def of(self, lengths: Ints, before: Ints, first_epoch: int, stop_epoch: int) -> Ints:
        """The visits to some consecutive documents in the epochs [first, stop).

        Args:
            before: [buckets], the source's documents in front of them.
        """
        bucket = self.buckets(lengths)
        rank = _rank_in_bucket(bucket, before)
        up, down = self._numerator[bucket], self._denominator[bucket]
        return (rank + stop_epoch) * up // down - (rank + first_epoch) * up // down


def _rank_in_bucket(bucket: Ints, before: Ints) -> Ints:
    rank = np.empty(len(bucket), np.int64)
    for number, first in enumerate(before.tolist()):
        members = np.flatnonzero(bucket == number)
        rank[members] = np.arange(first, first + len(members))
    return rank


@dataclass(frozen=True)
class Window:
    """Consecutive shards of an epoch, whose documents are shuffled together.

    Attributes:
        shards: what has to be at hand.
        visits: [n], a document for each visit, before they are shuffled.
    """

    shards: Ints
    visits: NDArray[np.int32]


class SourceOrder:
    """An epoch permutes the shards, cuts their order into windows, and permutes the documents of
    each window. A growing source takes its shards as they are written instead, in every epoch: the
    order is the same whether they are written before or while they are read.

    Costs 4 bytes of memory per document of a window, and as much again while it is made.

    Args:
        key: names the permutations, with the number of the epoch and the window.
        shuffle_shards: in a window.
        beat: called every few seconds while the shards of a growing source are waited for.
    """

    def __init__(
        self,
        documents: Documents,
        key: Sequence[int],
        shuffle_shards: int,
        visits: Visits,
        growing: bool,
        beat: Callable[[], None],
    ) -> None:
        self._documents = documents
        self._key = tuple(key)
        self._shards_per_window = shuffle_shards
        self._visits = visits
        self._growing = growing
        self._beat = beat
        self._first = np.zeros(1, np.int64)
        self._before = visits.count(documents.lengths[:0])[None]
        self._made: tuple[tuple[int, int], Window | None] | None = None

    def window(self, epoch: int, number: int) -> Window | None:
        """None past the end of the epoch. Waits until the shards are written."""
        if self._made is None or self._made[0] != (epoch, number):
            self._made = (epoch, number), self._make(epoch, number)
        return self._made[1]

    def shards(self, epoch: int, number: int) -> Ints:
        """Those of a window that are written; none past the end of the epoch."""
        count, size = len(self._documents.shard_documents), self._shards_per_window
        first = min(number * size, count)
        stop = min(first + size, count)
        if self._growing or count <= size:
            return np.arange(first, stop)
        return np.sort(permuted(first, stop, count, (*self._key, epoch, 0)))

    def shards_begun(self, epoch: int, number: int, is_begun: bool) -> int:
        """What a place depends on: all shards, unless the source grows."""
        count = len(self._documents.shard_documents)
        if not self._growing or epoch > 0:
            return count
        return min((number + is_begun) * self._shards_per_window, count)

    def upcoming(self, epoch: int, number: int, first: int, at_most: int) -> Ints | None:
        """The documents of a window from its visit `first` on; None past the end of the epoch."""
        window = self.window(epoch, number)
        if window is None:
            return None
        size = len(window.visits)
        places = permuted(
            first, max(first, min(first + at_most, size)), size, (*self._key, epoch, 1 + number)
        )
        return window.visits[places].astype(np.int64)

    def tokens_of_epochs(self, epochs: int) -> int:
        """How many tokens the first `epochs` have together."""
        lengths = self._documents.lengths
        if self._visits.is_plain:
            return epochs * int(lengths.sum())
        nothing = np.zeros_like(self._before[0])
        return int((lengths * self._visits.of(lengths, nothing, 0, epochs)).sum())

    def _make(self, epoch: int, number: int) -> Window | None:
        if self._growing:
            self._documents.wait_for((number + 1) * self._shards_per_window, self._beat)
        shards = self.shards(epoch, number)
        if not len(shards):
            return None
        self._list_shards()
        visits = [self._visits_of_shard(shard, epoch) for shard in shards.tolist()]
        return Window(shards, np.concatenate(visits))

    def _list_shards(self) -> None:
        """Know of each shard where its documents begin, and how many of each bucket are before."""
        known = len(self._first) - 1
        documents = self._documents.shard_documents[known:]
        if not len(documents):
            return
        first = self._first[-1] + np.cumsum(documents)
        self._first = np.concatenate([self._first, first])
        if self._visits.is_plain:
            return
        bounds = self._first[known:]
        lengths = self._documents.lengths
        counts = [self._visits.count(lengths[a:b]) for a, b in pairwise(bounds)]
        self._before = np.concatenate(
            [self._before, self._before[-1] + np.cumsum(np.array(counts), axis=0)]
        )

    def _visits_of_shard(self, shard: int, epoch: int) -> NDArray[np.int32]:
        first, stop = self._first[shard : shard + 2].tolist()
        documents = np.arange(first, stop, dtype=np.int32)
        if self._visits.is_plain:
            return documents
        lengths = self._documents.lengths[first:stop]
        return np.repeat(documents, self._visits.of(lengths, self._before[shard], epoch, epoch + 1))


def permuted(first: int, stop: int, size: int, key: Sequence[int]) -> Ints:
    """The places of [first, stop) in the pseudorandom permutation of [0, size) that `key` names."""
    # numba takes a third of a second to import, and many who import this module shuffle nothing.
    from data_pipeline.kernels.permutation import FEISTEL_ROUNDS, permute_range

    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    places = np.empty(stop - first, np.int64)
    permute_range(first, size, half, keys, places)
    return places
