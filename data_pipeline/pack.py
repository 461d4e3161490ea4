"""Documents laid end to end in rows of equal length."""

import zlib
from collections.abc import Sequence
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
    """

    pieces: NDArray[np.int64]
    row_starts: NDArray[np.int64]

    @property
    def checksum(self) -> int:
        """The crc32 of it all."""
        return zlib.crc32(self.row_starts.tobytes(), zlib.crc32(self.pieces.tobytes()))


@dataclass(frozen=True)
class Batch:
    """Rows ready to train on, each [n, seq_len] int64.

    Attributes:
        tokens: the inputs.
        labels: the next token of the same document; -100 at a document's last token. The label of
            a row's last token is the token that the next row starts with, if the document goes on.
        position: the distance from the start of the document's piece in this row.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position: NDArray[np.int64]


def plan_rows(mixture: Mixture, rows: int, seq_len: int) -> BatchPlan:
    """Take the next rows * seq_len tokens; a document that overruns its row goes on in the next."""
    pieces: list[tuple[int, int, int, int]] = []
    row_starts = [0]
    for _ in range(rows):
        room = seq_len
        while room:
            piece = mixture.take(room)
            room -= piece[3] - piece[2]
            pieces.append(piece)
        row_starts.append(len(pieces))
    return BatchPlan(np.array(pieces, np.int64).reshape(-1, 4), np.array(row_starts, np.int64))


def read_rows(
    plan: BatchPlan, rows: Sequence[int], seq_len: int, readers: Sequence[TokenReader]
) -> Batch:
    """Read the chosen rows of a plan, and nothing else."""
    bounds = [(plan.row_starts[row], plan.row_starts[row + 1]) for row in rows]
    pieces = np.concatenate([plan.pieces[:0], *(plan.pieces[a:b] for a, b in bounds)])
    lengths = pieces[:, 3] - pieces[:, 2]
    ends = np.cumsum(lengths)
    starts = ends - lengths

    size = len(rows) * seq_len
    tokens = np.empty(size + 1, np.int64)
    last_labels = np.full(len(pieces), IGNORED_LABEL)
    for i, (source, document, start, stop) in enumerate(pieces.tolist()):
        piece = readers[source].read(document, start, stop + 1)
        tokens[starts[i] : ends[i]] = piece[: stop - start]
        if len(piece) > stop - start:
            last_labels[i] = piece[-1]
    labels = tokens[1:].copy()
    labels[ends - 1] = last_labels
    position = np.arange(size) - np.repeat(starts, lengths)

    shape = len(rows), seq_len
    return Batch(tokens[:-1].reshape(shape), labels.reshape(shape), position.reshape(shape))
