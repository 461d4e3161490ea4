"""Documents laid end to end in rows of equal length."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mixture import Mixture
from data_pipeline.shards import TokenReader

IGNORED_LABEL = -100


@dataclass(frozen=True)
class BatchPlan:
    """What fills each row of a global batch.

    Attributes:
        pieces: [n, 4] int64: source, document, start, stop (in tokens of the document).
        row_starts: [rows + 1] int64: row i holds the pieces [row_starts[i], row_starts[i + 1]).
        continues: [rows] bool: whether row i begins with the rest of the document that row i of the
            batch before has ended with; None: no row does.
        is_continued: [rows] bool: whether row i of the next batch will.
    """

    pieces: NDArray[np.int64]
    row_starts: NDArray[np.int64]
    continues: NDArray[np.bool_] | None = None
    is_continued: NDArray[np.bool_] | None = None

    @property
    def checksum(self) -> int:
        """The crc32 of it all."""
        return zlib.crc32(self.row_starts.tobytes(), zlib.crc32(self.pieces.tobytes()))


@dataclass(frozen=True)
class Batch:
    """Rows ready to train on, each [n, seq_len] int64.

    Attributes:
        tokens: the inputs.
        labels: the next token of the same document; -100 at a document's last token, and for a
            token that its source never predicts. The label of a row's last token is the token that
            the next row starts with, if the document goes on.
        position: the distance from the start of the document's piece in this row.
        source: the number of the token's source, int16.
        continues, is_continued: [n], as in `BatchPlan`.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position: NDArray[np.int64]
    source: NDArray[np.int16]
    continues: NDArray[np.bool_] | None = None
    is_continued: NDArray[np.bool_] | None = None


def plan_rows(mixture: Mixture, rows: int, seq_len: int) -> BatchPlan:
    """Take the next rows * seq_len tokens; a document that overruns its row goes on in the next."""
    return BatchPlan(*mixture.take(rows, seq_len))


def read_rows(
    plan: BatchPlan,
    rows: Sequence[int],
    seq_len: int,
    readers: Sequence[TokenReader],
    beat: Callable[[], None] = lambda: None,
) -> Batch:
    """Read the chosen rows of a plan, and nothing else; `beat` as in `TokenReader.tokens`."""
    from data_pipeline.kernels.rows import copy_pieces

    bounds = [(plan.row_starts[row], plan.row_starts[row + 1]) for row in rows]
    pieces = np.concatenate([plan.pieces[:0], *(plan.pieces[a:b] for a, b in bounds)])
    lengths = pieces[:, 3] - pieces[:, 2]
    starts = np.cumsum(lengths) - lengths

    shape = len(rows), seq_len
    tokens, labels, position = (np.empty(shape, np.int64) for _ in range(3))
    for number, reader in enumerate(readers):
        mine = np.flatnonzero(pieces[:, 0] == number)
        _, document, start, stop = pieces[mine].T
        shard = np.searchsorted(np.cumsum(reader.shard_documents), document, side="right")
        first_token, goes_on = reader.first_token[document], stop < reader.lengths[document]
        for of_shard, at in _by_shard(shard):
            copy_pieces(
                reader.tokens(of_shard, beat),
                first_token[at] + start[at],
                first_token[at] + stop[at],
                goes_on[at],
                starts[mine[at]],
                tokens.ravel(),
                labels.ravel(),
                position.ravel(),
                IGNORED_LABEL,
            )
        if predicted_from := reader.manifest.predicted_from:
            for piece in mine:
                of_piece = labels.ravel()[starts[piece] : starts[piece] + lengths[piece]]
                of_piece[of_piece < predicted_from] = IGNORED_LABEL
    joints = (
        None if of_plan is None else of_plan[np.asarray(rows, np.int64)]
        for of_plan in (plan.continues, plan.is_continued)
    )
    # Written for each token: as few bytes as will do.
    source = np.repeat(pieces[:, 0].astype(np.int16), lengths).reshape(shape)
    return Batch(tokens, labels, position, source, *joints)


def _by_shard(shard: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each shard, and the places of its pieces."""
    order = np.argsort(shard, kind="stable")
    numbers, first = np.unique(shard[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, first[1:]), strict=False)
