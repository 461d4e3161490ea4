"""How often an audit finds each token used, and whether sources have their shares.

These checks see batches of lanes when the lanes have ended, in the order of the stream.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.lanes import in_stream_order
from data_pipeline.order import Documents, Visits
from launch.audit_checks import Batch, Ints, first_few, mixture_of
from pretrain.ledger import AttemptBegun, Skipped


class _Blocks:
    """Puts the batches of lanes together, and their pieces into the order of the stream."""

    def __init__(self) -> None:
        self._batches: list[Ints] = []
        self.tokens = 0

    def add(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> Ints | None:
        """The pieces of all batches since lanes began, if they end with this one."""
        self._batches.append(pieces)
        self.tokens += batch.tokens
        if len(self._batches) < attempt.lane_rows(batch.step):
            return None
        block, self._batches, self.tokens = self._batches, [], 0
        return block[0] if len(block) == 1 else in_stream_order(block, batch.seq_len)


@dataclass(frozen=True)
class SourceUse:
    """How a source was used.

    Attributes:
        mixture_share: its part of so many tokens by the mixture, as it is configured now.
        share: its part of the tokens delivered.
        skipped_tokens: by reason.
        documents: begun, in all epochs.
        epochs: tokens delivered / tokens of the source.
        least_used: how often the token was delivered that was delivered least often.
        most_used: the same of the one that was delivered most often.
    """

    path: str
    mixture_share: float
    share: float
    trained_tokens: int
    skipped_tokens: dict[str, int]
    documents: int
    epochs: float
    least_used: int
    most_used: int


class UseCheck:
    """Each source delivers each of its tokens once per epoch, or as up-sampling says, whatever the
    mixture's order.

    Within its document, a piece has to begin where the last one ended. So a document's tokens were
    used as often as it was finished, and those before its last piece's end once more. Lanes are
    looked at when they have ended.

    Attributes:
        unfinished_tokens: of lanes that have not ended.
    """

    def __init__(
        self, paths: Sequence[str], lengths: Sequence[Ints], visits: Sequence[Visits]
    ) -> None:
        self._sources = [_Use(*each) for each in zip(paths, lengths, visits, strict=True)]
        self._blocks = _Blocks()

    def see(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> None:
        reason = batch.reason if isinstance(batch, Skipped) else None
        for use, mine in self._by_source(pieces):
            use.count(batch.step, reason, *mine[:, 1:].T)
        if (block := self._blocks.add(attempt, batch, pieces)) is not None:
            for use, mine in self._by_source(block):
                use.follow(batch.step, *mine[:, 1:].T)

    def _by_source(self, pieces: Ints) -> Iterator[tuple["_Use", Ints]]:
        for number, use in enumerate(self._sources):
            mine = pieces[pieces[:, 0] == number]
            if len(mine):
                yield use, mine

    @property
    def unfinished_tokens(self) -> int:
        return self._blocks.tokens

    @property
    def delivered(self) -> int:
        """Tokens of all sources."""
        return sum(use.delivered for use in self._sources)

    def problems(self) -> list[str]:
        return [problem for use in self._sources for problem in use.problems()]

    def of_sources(self, wanted: Sequence[int]) -> tuple[SourceUse, ...]:
        """The use of each source, of which the mixture delivers so many tokens."""
        delivered = max(1, self.delivered)
        return tuple(
            SourceUse(
                path=use.path,
                mixture_share=tokens / max(1, sum(wanted)),
                share=use.delivered / delivered,
                trained_tokens=use.trained,
                skipped_tokens=dict(use.skipped),
                documents=use.begun,
                epochs=use.delivered / use.size,
                least_used=use.least,
                most_used=use.most,
            )
            for use, tokens in zip(self._sources, wanted, strict=True)
        )


class _Use:
    """Of one source. 12 bytes of memory per document."""

    def __init__(self, path: str, lengths: Ints, visits: Visits) -> None:
        self.path = path
        self._visits = visits
        self.size = int(lengths.sum())
        self.followed = 0
        self.trained = 0
        self.skipped: Counter[str] = Counter()
        self.begun = 0
        self._lengths = lengths
        self._finished = np.zeros(len(lengths), np.int32)
        self._offset = np.zeros(len(lengths), np.int64)
        self._wrong: list[str] = []

    @property
    def delivered(self) -> int:
        return self.trained + self.skipped.total()

    @property
    def least(self) -> int:
        return int(self._finished.min())

    @property
    def most(self) -> int:
        return int((self._finished + (self._offset > 0)).max())

    def count(self, step: int, reason: str | None, document: Ints, start: Ints, stop: Ints) -> None:
        """Add pieces of this source, [n] each."""
        possible = self._are_possible(document, start, stop)
        if not possible.all():
            at = int(possible.argmin())
            self._wrong.append(
                f"step {step}: source {self.path} has no tokens {start[at]} to {stop[at]} of "
                f"document {document[at]}"
            )
        tokens = int((stop - start)[possible].sum())
        if reason is None:
            self.trained += tokens
        else:
            self.skipped[reason] += tokens
        self.begun += int((start == 0)[possible].sum())

    def _are_possible(self, document: Ints, start: Ints, stop: Ints) -> NDArray[np.bool_]:
        possible = (document >= 0) & (document < len(self._lengths)) & (start < stop)
        possible[possible] = stop[possible] <= self._lengths[document[possible]]
        return possible

    def follow(self, step: int, document: Ints, start: Ints, stop: Ints) -> None:
        """Pieces in the order of the stream."""
        possible = self._are_possible(document, start, stop)
        document, start, stop = document[possible], start[possible], stop[possible]
        if not len(document):
            return
        self.followed += int((stop - start).sum())
        by_document = np.argsort(document, kind="stable")
        document, start, stop = document[by_document], start[by_document], stop[by_document]
        is_first = np.append(True, document[1:] != document[:-1])
        is_last = np.append(is_first[1:], True)
        is_end = stop == self._lengths[document]
        goes_on_at = np.where(is_end, 0, stop)
        expected = np.where(is_first, self._offset[document], np.append(0, goes_on_at[:-1]))
        if (start != expected).any():
            at = int((start != expected).argmax())
            self._wrong.append(
                f"step {step}: document {document[at]} of source {self.path} goes on at token "
                f"{start[at]}, after it was used up to token {expected[at]}"
            )
        np.add.at(self._finished, document[is_end], 1)
        self._offset[document[is_last]] = goes_on_at[is_last]

    def problems(self) -> list[str]:
        least, most = self._visits_by_now()
        begun = self._finished + (self._offset > 0)
        if (self._finished < least).any() or (begun > most).any():
            self._wrong.append(
                f"source {self.path}: tokens were used between {self.least} and {self.most} times; "
                f"in {self.followed / self.size:.3f} epochs it should be {least.min()} to "
                f"{most.max()}"
            )
        return first_few(self._wrong)

    def _visits_by_now(self) -> tuple[Ints, Ints]:
        """To each document: in the whole epochs delivered, and with the one that has begun."""
        nothing = np.zeros_like(self._visits.count(self._lengths[:0]))
        epochs = self.followed // self.size if self._visits.is_plain else 0
        before = self._visits.of(self._lengths, nothing, 0, epochs)
        while True:
            after = self._visits.of(self._lengths, nothing, 0, epochs + 1)
            tokens = int((after * self._lengths).sum())
            if tokens > self.followed:
                return before, after
            if tokens == self.followed:
                return after, after
            epochs, before = epochs + 1, after


class SharesCheck:
    """Each source has delivered what the mixture owes it, up to a document per other one.

    Only where all attempts have had one mixture: what is owed is counted from the first token on.
    """

    def __init__(self, paths: Sequence[str], documents: Sequence[Documents]) -> None:
        self._paths = paths
        self._documents = documents
        self._delivered = np.zeros(len(paths), np.int64)
        self._attempts: list[AttemptBegun] = []
        self._blocks = _Blocks()

    def see(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> None:
        if (block := self._blocks.add(attempt, batch, pieces)) is not None:
            source, tokens = block[:, 0], block[:, 3] - block[:, 2]
            known = (source >= 0) & (source < len(self._paths))
            np.add.at(self._delivered, source[known], tokens[known])
        if not any(attempt is seen for seen in self._attempts):
            self._attempts.append(attempt)

    def problems(self) -> list[str]:
        if not self._attempts or any(
            _weights(attempt) != _weights(self._attempts[0]) for attempt in self._attempts
        ):
            return []
        mixture = mixture_of(self._attempts[0], self._paths, self._documents)
        wanted = mixture.outlook(int(self._delivered.sum()))
        longest = max(int(of.lengths.max()) for of in self._documents)
        # One that ends does so with a whole document, which the others are behind by.
        allowed = longest * max(1, len(wanted) - 1 + mixture.has_end)
        return [
            f"source {path} has delivered {delivered:,} tokens; by its weight it should be "
            f"{due:,.0f}, give or take {allowed:,}"
            for path, delivered, due in zip(self._paths, self._delivered, wanted, strict=True)
            if abs(delivered - due) > allowed
        ]


def _weights(attempt: AttemptBegun) -> tuple[Any, ...]:
    amounts = [(source.weight, source.epochs, source.max_epochs) for source in attempt.sources]
    return *amounts, attempt.curriculum
