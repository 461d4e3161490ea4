"""What a model is trained on, as people read it: documents of a batch, with where they begin."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream import BatchPlan, TokenStream, load_tokenizer
from pretrain.run_dir import RunDirectory, write_atomically

NAME = "data/samples"
# Of a row: there may be thousands of documents in a million tokens.
MAX_DOCUMENTS = 32
# Of a document.
MAX_TOKENS = 256


@dataclass(frozen=True)
class Sample:
    """A document, or a piece of one, in a row of a global batch.

    Attributes:
        row: of the batch.
        source: its name.
        document: its number in the source.
        begins_at: its first token's place in the row.
        from_token: what comes before in the document, in tokens: it went into the row before.
        tokens: how many are in the row.
        text: of the first MAX_TOKENS of them.
    """

    row: int
    source: str
    document: int
    begins_at: int
    from_token: int
    tokens: int
    text: str


COLUMNS = tuple(field.name for field in fields(Sample))


@dataclass(frozen=True)
class Beginnings:
    """The beginnings of documents, not yet text.

    Attributes:
        pieces: as in `BatchPlan`, of each row.
        tokens: [rows, T].
    """

    pieces: Sequence[NDArray[np.int64]]
    tokens: NDArray[np.int64]

    @classmethod
    def of(cls, stream: TokenStream, plan: BatchPlan, rows: int) -> "Beginnings":
        """Those of the first rows of a batch, which are read, so this rank should have them."""
        bounds = plan.row_starts[: rows + 1].tolist()
        pieces = [
            plan.pieces[first : min(stop, first + MAX_DOCUMENTS)]
            for first, stop in pairwise(bounds)
        ]
        return cls(pieces, stream.read(plan, range(rows)).tokens)

    def as_text(self, tokenizer: Path, sources: Sequence[str]) -> list[Sample]:
        """
        Args:
            sources: their names.
        """
        decode = load_tokenizer(tokenizer).decode
        samples = []
        for row, of_row in enumerate(self.pieces):
            begins_at = 0
            for source, document, start, stop in of_row.tolist():
                ids = self.tokens[row, begins_at : begins_at + min(stop - start, MAX_TOKENS)]
                text = decode(ids.tolist())
                tokens = stop - start
                samples.append(
                    Sample(row, sources[source], document, begins_at, start, tokens, text)
                )
                begins_at += tokens
        return samples


def write_samples(run: RunDirectory, attempt: int, step: int, samples: Sequence[Sample]) -> None:
    """
    Args:
        step: whose row they are shown with.
    """
    tree = {"step": step, "samples": [asdict(sample) for sample in samples]}
    write_atomically(run.samples_of(attempt), json.dumps(tree) + "\n")


def read_samples(run: RunDirectory) -> dict[int, list[Sample]]:
    """Those of each attempt, by the step they are shown with."""
    trees: list[Mapping[str, Any]] = [
        json.loads(path.read_text())
        for attempt in run.all_attempts()
        if (path := run.samples_of(attempt)).exists()
    ]
    return {tree["step"]: [Sample(**sample) for sample in tree["samples"]] for tree in trees}
