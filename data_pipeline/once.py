"""All documents of a folder of shards, each once, in rows that are always the same."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.pack import IGNORED_LABEL, Batch, BatchPlan, read_rows
from data_pipeline.shards import Cache, TokenReader, load_manifest


class OnceThrough:
    """Documents laid end to end, in the order of the shards, to evaluate on.

    Each token is predicted once, unless its document begins with it. A document that overruns its
    row goes on in the next, as in training. What fills up the last row is never predicted.

    Args:
        path: of a finished folder, as of a `Source`.
        most_tokens: use whole rows of at most so many tokens from the beginning, one at least;
            None is all.

    Attributes:
        rows: how many it has.
        tokens: in these rows, without what fills up the last one.

    Raises:
        DataError: the shards are missing or damaged, or have nothing to predict.
    """

    def __init__(
        self,
        path: str,
        seq_len: int,
        *,
        most_tokens: int | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.seq_len = seq_len
        self.manifest = load_manifest(path, cache=cache)
        if self.manifest.tokens == self.manifest.documents:
            raise DataError(
                f"{path}: its {self.manifest.documents} documents are empty, there is nothing to "
                "predict; name other shards"
            )
        self._reader = TokenReader(self.manifest)
        self._ends = np.cumsum(self._reader.lengths)
        self._total = int(self._ends[-1])
        self.tokens = self._total
        if most_tokens is not None:
            whole_rows = max(1, most_tokens // seq_len)
            self.tokens = min(self._total, whole_rows * seq_len)
        self.rows = -(-self.tokens // seq_len)

    def read(self, rows: Sequence[int], beat: Callable[[], None] = lambda: None) -> Batch:
        """These rows; after the last one come rows without a label.

        Args:
            beat: called every few seconds while a shard is fetched.
        """
        of_rows = [
            np.concatenate(list(self._pieces(row * self.seq_len, (row + 1) * self.seq_len)))
            for row in rows
        ]
        row_starts = np.cumsum([0, *(len(pieces) for pieces in of_rows)])
        plan = BatchPlan(np.concatenate(of_rows), row_starts)
        batch = read_rows(plan, range(len(rows)), self.seq_len, [self._reader], beat)
        place = np.asarray(rows)[:, None] * self.seq_len + np.arange(self.seq_len)
        batch.labels[place >= self.tokens] = IGNORED_LABEL
        return batch

    def _pieces(self, start: int, stop: int) -> Iterator[NDArray[np.int64]]:
        """Pieces [n, 4], as of a `BatchPlan`, of these tokens; after the last comes the first."""
        while start < stop:
            first = start % self._total
            last = min(first + stop - start, self._total)
            documents = np.arange(
                np.searchsorted(self._ends, first, "right"),
                np.searchsorted(self._ends, last, "left") + 1,
            )
            begin = self._ends[documents] - self._reader.lengths[documents]
            of_document = np.stack([np.full(len(documents), first), np.full(len(documents), last)])
            of_document = (of_document - begin).clip(0, self._reader.lengths[documents])
            yield np.stack([np.zeros_like(documents), documents, *of_document], 1)
            start += last - first
