"""Rows of a stream that follow each other in time, for a model that remembers the one before.

The stream is taken a block at a time, of `rows` consecutive rows for each lane, that is, for each
row of a batch. Batch j of the block has row j of every lane:

    stream   0 1 2 | 3 4 5 | 6 7 8 | 9 ...       two lanes of three rows: a block is six rows
    batch 0  0       3
    batch 1    1       4
    batch 2      2       5
    batch 3                  6       9

So a document that is longer than a row goes on in the same lane with the next batch, unless its
lane ends. With one row for each lane, batches are the stream as it comes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.mixture import Mixture
from data_pipeline.pack import BatchPlan, plan_rows

Bools = NDArray[np.bool_]


class Lanes:
    """Plans batches, a block of them at a time; a few integers resume it in the middle of one.

    Args:
        rows: of each lane.
    """

    def __init__(self, mixture: Mixture, rows: int = 1) -> None:
        self.mixture = mixture
        self.rows = rows
        self._block: _Block | None = None

    @property
    def tokens(self) -> int:
        """Delivered since the start."""
        waiting = self._block.waiting_tokens if self._block else 0
        return self.mixture.tokens - waiting

    def next(self, sequences: int, seq_len: int) -> BatchPlan:
        """The next batch of `sequences` rows.

        Raises:
            DataError: the sources are used up within the block; or it is of other rows.
        """
        if self.rows == 1:
            return plan_rows(self.mixture, sequences, seq_len)
        if not sequences:
            return plan_rows(self.mixture, 0, seq_len)
        if self._block is None:
            self._block = _Block(self.mixture, self.rows, sequences, seq_len)
        self._block.check(self.rows, seq_len, sequences)
        plan = self._block.next()
        if self._block.is_over:
            self._block = None
        return plan

    def state_dict(self) -> dict[str, Any]:
        """`cursors` of the sources where the block begins, and where it stands within the block."""
        if self._block is None:
            return {"cursors": self.mixture.state_dict()}
        return self._block.state_dict()

    def load_state_dict(self, state: dict[str, Any], seq_len: int) -> None:
        """Go to where `state` was taken, of rows of `seq_len` tokens if that is within a block.

        Raises:
            DataError: the block has rows of another length, or another number for each lane; or the
                mixture is another one by now.
        """
        self.mixture.load_state_dict(state["cursors"])
        self._block, lanes = None, state.get("lanes")
        if lanes:
            self._block = _Block(
                self.mixture, lanes["rows"], lanes["sequences"], lanes["seq_len"], lanes["done"]
            )
            self._block.check(self.rows, seq_len)
            self._block.check_plan(lanes["checksum"])


class _Block:
    """The rows of all lanes, and how many batches of them have been delivered."""

    def __init__(
        self, mixture: Mixture, rows: int, sequences: int, seq_len: int, done: int = 0
    ) -> None:
        self._rows, self._sequences, self._seq_len, self._done = rows, sequences, seq_len, done
        self._begin = mixture.state_dict()
        plan = plan_rows(mixture, rows * sequences, seq_len)
        self._plan = plan
        self._delivered = np.zeros(len(self._begin), np.int64)
        self._goes_on = _goes_on(plan).reshape(sequences, rows)
        self._goes_on[:, -1] = False
        for batch in range(done):
            self._count(self._rows_of(batch).pieces)

    @property
    def is_over(self) -> bool:
        return self._done == self._rows

    @property
    def waiting_tokens(self) -> int:
        return (self._rows - self._done) * self._sequences * self._seq_len

    def check(self, rows: int, seq_len: int, sequences: int | None = None) -> None:
        mine = self._rows, self._seq_len, self._sequences
        theirs = rows, seq_len, self._sequences if sequences is None else sequences
        if mine != theirs:
            left = self._rows - self._done
            raise DataError(
                f"the stream stands within lanes of {mine[0]} rows of {mine[1]} tokens, "
                f"{mine[2]} side by side, and is asked for lanes of {theirs[0]} rows of "
                f"{theirs[1]} tokens, {theirs[2]} side by side: context.lane_rows, data.seq_len "
                f"and train.global_batch can change where lanes end, {left} batches from here"
            )

    def check_plan(self, checksum: int) -> None:
        """Make sure that the rest of the block is what it was when it began."""
        if self._plan.checksum != checksum:
            left = self._rows - self._done
            raise DataError(
                "the mixture is another one than when the lanes began in which the stream stands: "
                "some documents would be trained on twice, and others never. Weights, epochs, "
                "max_epochs and data.curriculum can change where lanes end (context.lane_rows), "
                f"{left} batches from here"
            )

    def next(self) -> BatchPlan:
        plan = self._rows_of(self._done)
        self._count(plan.pieces)
        self._done += 1
        return plan

    def state_dict(self) -> dict[str, Any]:
        lanes = {
            "rows": self._rows,
            "sequences": self._sequences,
            "seq_len": self._seq_len,
            "done": self._done,
            "delivered": self._delivered.tolist(),
            "checksum": self._plan.checksum,
        }
        return {"cursors": self._begin, "lanes": lanes}

    def _rows_of(self, batch: int) -> BatchPlan:
        return _choose(
            self._plan, np.arange(self._sequences) * self._rows + batch, self._joints(batch)
        )

    def _joints(self, batch: int) -> tuple[Bools, Bools]:
        nothing = np.zeros(self._sequences, bool)
        before = self._goes_on[:, batch - 1] if batch else nothing
        return before, self._goes_on[:, batch]

    def _count(self, pieces: NDArray[np.int64]) -> None:
        np.add.at(self._delivered, pieces[:, 0], pieces[:, 3] - pieces[:, 2])


def in_stream_order(batches: list[NDArray[np.int64]], seq_len: int) -> NDArray[np.int64]:
    """The pieces of the batches of a block, [n, 4] each, in the order of the stream.

    The batches are the first of their block; rows of those that are missing are left out.
    """
    keys, pieces = [], np.concatenate(batches)
    for number, of_batch in enumerate(batches):
        lane = (np.cumsum(of_batch[:, 3] - of_batch[:, 2]) - 1) // seq_len
        keys.append(lane * len(batches) + number)
    return pieces[np.argsort(np.concatenate(keys), kind="stable")]


def _goes_on(plan: BatchPlan) -> Bools:
    """Of each row, whether the next one begins with the rest of its last document."""
    last, first = plan.pieces[plan.row_starts[1:] - 1], plan.pieces[plan.row_starts[1:-1]]
    same = (last[:-1, :2] == first[:, :2]).all(axis=1) & (last[:-1, 3] == first[:, 2])
    return np.append(same, False)


def _choose(plan: BatchPlan, rows: NDArray[np.int64], joints: tuple[Bools, Bools]) -> BatchPlan:
    """A plan of some rows of another."""
    starts, stops = plan.row_starts[rows], plan.row_starts[rows + 1]
    counts = stops - starts
    row_starts = np.append(0, np.cumsum(counts))
    places = np.arange(row_starts[-1]) + np.repeat(starts - row_starts[:-1], counts)
    return BatchPlan(plan.pieces[places], row_starts, *joints)
