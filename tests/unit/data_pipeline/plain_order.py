"""The order of documents in plain Python, one token at a time: what the stream is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_pipeline.sources import Source, WeightsFrom, phases_of, shares_of

UNITS = 10**9
WORD = 1 << 64


@dataclass
class Listed:
    """The documents of a source that is not on any disk."""

    lengths: np.ndarray
    shard_documents: np.ndarray

    def wait_for(self, shards: int, beat: Callable[[], None]) -> None:
        assert shards > 0


def listed(shards: Sequence[Sequence[int]]) -> Listed:
    lengths = [length for shard in shards for length in shard]
    return Listed(np.array(lengths, np.int64), np.array([len(s) for s in shards], np.int64))


def permutation(size: int, key: Sequence[int]) -> list[int]:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [int(k) for k in np.random.SeedSequence(key).generate_state(6, np.uint64)]

    def once(place: int) -> int:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        return left << half | right

    places = []
    for index in range(size):
        place = once(index)
        while place >= size:
            place = once(place)
        places.append(place)
    return places


def mix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def visits(source: Source, lengths: Sequence[int], epoch: int) -> list[int]:
    """How often an epoch visits each document."""
    seen: dict[Fraction, int] = {}
    counts = []
    for length in lengths:
        passed = [least for least in source.upsample if length >= least]
        times = Fraction(str(source.upsample[max(passed)])) if passed else Fraction(1)
        bucket = max(passed, default=0)
        rank = seen.get(bucket, 0)
        seen[bucket] = rank + 1
        counts.append(int((rank + epoch + 1) * times) - int((rank + epoch) * times))
    return counts


def documents_of(
    source: Source, number: int, shards: Sequence[Sequence[int]], seed: int, width: int
) -> Iterator[tuple[int, int]]:
    """(document, epoch) for ever."""
    lengths = [length for shard in shards for length in shard]
    firsts = [sum(len(s) for s in shards[:i]) for i in range(len(shards))]
    epoch = 0
    while True:
        times = visits(source, lengths, epoch)
        order = list(range(len(shards)))
        if not source.growing and len(shards) > width:
            order = permutation(len(shards), (seed, number, epoch, 0))
        for window, first in enumerate(range(0, len(order), width)):
            listed = [
                document
                for shard in sorted(order[first : first + width])
                for document in range(firsts[shard], firsts[shard] + len(shards[shard]))
                for _ in range(times[document])
            ]
            if listed:
                for place in permutation(len(listed), (seed, number, epoch, 1 + window)):
                    yield listed[place], epoch
        epoch += 1


def tokens_until(source: Source, shards: Sequence[Sequence[int]]) -> float:
    """At how many tokens a source is used up."""
    if source.limit is None:
        return float("inf")
    lengths = [length for shard in shards for length in shard]

    def of(epoch: int) -> int:
        return sum(n * k for n, k in zip(lengths, visits(source, lengths, epoch), strict=True))

    whole = int(source.limit)
    return sum(map(of, range(whole))) + -int(-(source.limit - whole) * of(whole) // 1)


def stream(
    sources: Sequence[Source],
    shards: Sequence[Sequence[Sequence[int]]],
    seed: int,
    width: int,
    curriculum: Sequence[WeightsFrom] = (),
) -> Iterator[tuple[int, int, int]]:
    """(source, document, token of it) until the sources are used up."""
    orders = [
        documents_of(source, number, of, seed, width)
        for number, (source, of) in enumerate(zip(sources, shards, strict=True))
    ]
    limits = [tokens_until(source, of) for source, of in zip(sources, shards, strict=True)]
    phases = phases_of(sources, curriculum)
    if sources[0].epochs is not None:
        phases = ((0, tuple(map(float, limits))),)
    taken, owed, delivered = [0] * len(sources), [0] * len(sources), 0

    def shares() -> list[int]:
        (weights,) = [w for first, w in phases if first <= delivered][-1:]
        left = [w if n < end else 0 for w, n, end in zip(weights, taken, limits, strict=True)]
        return shares_of(left, UNITS) if any(left) else []

    while current := shares():
        candidates = [i for i, share in enumerate(current) if share]
        source = max(candidates, key=lambda i: (owed[i], -i))
        document, _ = next(orders[source])
        length = [n for shard in shards[source] for n in shard][document]
        for token in range(length):
            yield source, document, token
            # The source whose document is open stays until its end.
            kept, taken[source] = taken[source], 0
            current = shares()
            taken[source] = kept + 1
            owed = [o + share for o, share in zip(owed, current, strict=True)]
            owed[source] -= UNITS
            delivered += 1
