"""The endless order of documents drawn from weighted sources; a few integers resume it."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.kernels import columns
from data_pipeline.order import Documents, SourceOrder, Visits
from data_pipeline.sources import Source, WeightsFrom, phases_of, shares_of

Ints = NDArray[np.int64]

DEFAULT_SHUFFLE_SHARDS = 64
DOCUMENTS_QUEUED = 2048
# Shares are counted in units of it: what is owed stays exact, and below 2**63 as long as documents
# have fewer than 9e9 tokens together, one of each source.
SHARE_UNITS = 10**9
NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Cursor:
    """How far one source has been read.

    Attributes:
        epoch: passes over the source completed.
        window: windows completed in this epoch.
        documents: documents begun in this window.
        offset: tokens already taken from the document begun last; 0 when it is finished.
        tokens: tokens taken in all epochs.
        owed: tokens that its share exceeds them by, in units of 1 / SHARE_UNITS.
    """

    epoch: int = 0
    window: int = 0
    documents: int = 0
    offset: int = 0
    tokens: int = 0
    owed: int = 0


class Mixture:
    """Documents of all sources laid end to end.

    The next document comes from the source that is owed most, so that no source ever strays from
    its share by more than a document per other source. What a source is owed grows by its share of
    each token that is delivered, whatever that share is at the time: a change of weights is no
    reason to catch up. A source that is used up, after its last whole document, leaves its share to
    the others.

    Args:
        documents: of each source.
        seed: of the order of documents.
        shuffle_shards: so many shards of a source are shuffled together.
        curriculum: weights that change at a token of the stream.

    Attributes:
        beat: called every few seconds while shards of a growing source are waited for.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        sources: Sequence[Source],
        seed: int,
        *,
        shuffle_shards: int = DEFAULT_SHUFFLE_SHARDS,
        curriculum: Sequence[WeightsFrom] = (),
    ) -> None:
        self._sources = list(sources)
        self._documents = list(documents)
        self.beat: Callable[[], None] = lambda: None
        self._orders = [
            SourceOrder(
                of, (seed, number), shuffle_shards, Visits(source.times), source.growing, self._beat
            )
            for number, (of, source) in enumerate(zip(documents, sources, strict=True))
        ]
        phases = phases_of(sources, curriculum)
        self._limits = [
            NEVER if source.limit is None else _tokens_until(order, source.limit)
            for source, order in zip(sources, self._orders, strict=True)
        ]
        if all(source.epochs is not None for source in sources):
            phases = ((0, tuple(map(float, self._limits))),)
        self._phases = phases
        self.load_state_dict([asdict(Cursor()) for _ in sources])

    @property
    def tokens(self) -> int:
        """Delivered since the start."""
        return int(self._place[columns.TOTAL])

    def _beat(self) -> None:
        self.beat()

    @property
    def has_end(self) -> bool:
        """Whether a source can be used up."""
        return min(self._limits) < NEVER

    def state_dict(self) -> list[dict[str, int]]:
        open_source, offset = self._place[[columns.OPEN, columns.OFFSET]].tolist()
        return [
            asdict(
                Cursor(
                    epoch,
                    window,
                    first + values[columns.BEGUN],
                    offset if number == open_source else 0,
                    values[columns.TOKENS],
                    values[columns.OWED],
                )
            )
            for number, ((epoch, window, first), values) in enumerate(
                zip(self._queue_at, self._columns.tolist(), strict=True)
            )
        ]

    def load_state_dict(self, state: Sequence[dict[str, int]]) -> None:
        cursors = [Cursor(**cursor) for cursor in state]
        is_open = [cursor.offset > 0 for cursor in cursors]
        size = len(cursors), DOCUMENTS_QUEUED
        self._queue, self._lengths = np.zeros(size, np.int64), np.zeros(size, np.int64)
        # Epoch, window, and the visit of the window that the queue begins with.
        self._queue_at = [
            (cursor.epoch, cursor.window, cursor.documents - opened)
            for cursor, opened in zip(cursors, is_open, strict=True)
        ]
        self._columns = np.zeros((len(cursors), 6), np.int64)
        self._columns[:, columns.TOKENS] = [cursor.tokens for cursor in cursors]
        self._columns[:, columns.OWED] = [cursor.owed for cursor in cursors]
        self._columns[:, columns.LIMIT] = self._limits
        self._place = np.zeros(7, np.int64)
        self._place[columns.OPEN] = -1
        self._place[columns.TOTAL] = sum(cursor.tokens for cursor in cursors)
        if any(is_open):
            source = is_open.index(True)
            self._enqueue(source)
            self._columns[source, columns.BEGUN] = 1
            self._place[[columns.OPEN, columns.OFFSET]] = source, cursors[source].offset
        self._set_shares()

    def take(self, rows: int, seq_len: int) -> tuple[Ints, Ints]:
        """The next rows: pieces [n, 4] (source, document, start, stop), and where each row begins
        among them, [rows + 1].

        Raises:
            DataError: the sources are used up before.
        """
        # numba takes a third of a second to import.
        from data_pipeline.kernels.rows import fill_rows

        pieces = np.empty((rows + DOCUMENTS_QUEUED, 4), np.int64)
        row_starts = np.zeros(rows + 1, np.int64)
        self._place[[columns.ROWS, columns.FILLED, columns.PIECES]] = 0
        reason = -1
        while reason != columns.IS_FULL:
            reason, source = fill_rows(
                self._queue,
                self._lengths,
                self._columns,
                self._place,
                pieces,
                row_starts,
                seq_len,
                SHARE_UNITS,
            )
            if reason == columns.NEEDS_ROOM:
                pieces = np.concatenate([pieces, np.empty_like(pieces)])
            elif reason == columns.NEEDS_DOCUMENTS:
                self._move_on(source)
            elif reason in (columns.SHARES_CHANGE, columns.SOURCE_ENDS):
                self._set_shares()
            elif reason == columns.ALL_USED_UP:
                raise DataError(self._used_up())
        return pieces[: self._place[columns.PIECES]].copy(), row_starts

    def shards_needed(self) -> list[tuple[int, int, Ints]]:
        """Of each source epoch, window, and the shards of it and of the next one."""
        return [
            (epoch, window, self._shards_from(source, epoch, window))
            for source, (epoch, window, _) in enumerate(self._queue_at)
        ]

    def shards_begun(self) -> list[int]:
        """Of a growing source those up to its window, of others all: what the state depends on."""
        return [
            order.shards_begun(epoch, window, first + int(begun) > 0)
            for order, (epoch, window, first), begun in zip(
                self._orders, self._queue_at, self._columns[:, columns.BEGUN], strict=True
            )
        ]

    def outlook(self, tokens: int) -> list[int]:
        """How many tokens of each source are among the first `tokens`, to within documents.

        They sum to less if the sources are used up before.
        """
        used = [Fraction(0)] * len(self._sources)
        bounds = [first for first, _ in self._phases[1:]] + [tokens]
        for (first, weights), stop in zip(self._phases, bounds, strict=True):
            left = Fraction(min(stop, tokens) - first)
            while left > 0:
                active = self._active(weights, used)
                if not any(active):
                    return list(map(int, used))
                shares = [Fraction(share, SHARE_UNITS) for share in shares_of(active, SHARE_UNITS)]
                ends = [
                    (self._limits[i] - used[i]) / share for i, share in enumerate(shares) if share
                ]
                part = min(left, *ends)
                used = [u + share * part for u, share in zip(used, shares, strict=True)]
                left -= part
        return list(map(round, used))

    def _active(self, weights: Sequence[float], used: Sequence[Fraction | int]) -> list[float]:
        return [
            weight if taken < limit else 0.0
            for weight, taken, limit in zip(weights, used, self._limits, strict=True)
        ]

    def _set_shares(self) -> None:
        """Those of the phase and the sources that are left; for the first documents, too."""
        total, open_source = self._place[[columns.TOTAL, columns.OPEN]].tolist()
        starts = [first for first, _ in self._phases]
        phase = bisect_right(starts, total) - 1
        self._place[columns.CHANGE] = [*starts, NEVER][phase + 1]
        used = self._columns[:, columns.TOKENS].tolist()
        if open_source >= 0:
            # Its limit is looked at when the document ends.
            used[open_source] = min(used[open_source], self._limits[open_source] - 1)
        active = self._active(self._phases[phase][1], used)
        shares = shares_of(active, SHARE_UNITS) if any(active) else [0] * len(active)
        self._columns[:, columns.SHARE] = shares

    def _move_on(self, source: int) -> None:
        epoch, window, first = self._queue_at[source]
        begun = int(self._columns[source, columns.BEGUN])
        self._queue_at[source] = epoch, window, first + begun
        self._columns[source, columns.BEGUN] = 0
        self._enqueue(source)

    def _enqueue(self, source: int) -> None:
        """Queue a source's documents from where it stands, in the next window if there are none.

        Raises:
            DataError: there are no documents at all.
        """
        epoch, window, first = self._queue_at[source]
        order, queued = self._orders[source], np.empty(0, np.int64)
        while not len(queued):
            upcoming = order.upcoming(epoch, window, first, DOCUMENTS_QUEUED)
            if upcoming is None:
                self._refuse_empty(source)
                epoch, window, first = epoch + 1, 0, 0
            elif not len(upcoming):
                window, first = window + 1, 0
            else:
                queued = upcoming
        self._queue_at[source] = epoch, window, first
        self._queue[source, : len(queued)] = queued
        self._lengths[source, : len(queued)] = self._documents[source].lengths[queued]
        self._columns[source, columns.QUEUED] = len(queued)

    def _used_up(self) -> str:
        ends = ", ".join(
            f"{source.name} after {float(source.limit):g} epochs"
            for source in self._sources
            if source.limit is not None
        )
        return (
            f"the data is used up after {self.tokens:,} tokens: {ends}. Lower train.steps, raise "
            "epochs or max_epochs in data.shards, or add a source; the run can go on with that"
        )

    def _refuse_empty(self, source: int) -> None:
        if not self._documents[source].lengths.any():
            raise DataError(
                f"source {self._sources[source].path} has no tokens; remove it from the list"
            )

    def _shards_from(self, source: int, epoch: int, window: int) -> Ints:
        order = self._orders[source]
        following = order.shards(epoch, window + 1)
        if not len(following):
            following = order.shards(epoch + 1, 0)
        return np.concatenate([order.shards(epoch, window), following])


def _tokens_until(order: SourceOrder, epochs: Fraction) -> int:
    """How many tokens so many epochs have; of the last one's, the first that are enough."""
    whole = int(epochs)
    tokens = order.tokens_of_epochs(whole)
    return tokens + ceil((epochs - whole) * (order.tokens_of_epochs(whole + 1) - tokens))
