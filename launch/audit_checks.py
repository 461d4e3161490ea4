"""What an audit checks, batch by batch, in the order of the stream.

Each check sees all batches that count, and then tells what does not hold.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.lanes import Lanes, in_stream_order
from data_pipeline.mixture import Mixture
from data_pipeline.order import Documents, Visits
from data_pipeline.shards import Manifest
from data_pipeline.stream import ORDER_VERSION, BatchPlan, Source, WeightsFrom
from pretrain.ledger import AttemptBegun, Skipped, Trained
from pretrain.metrics.sinks import read_metrics

Batch = Trained | Skipped
Ints = NDArray[np.int64]

TOLD_AT_MOST = 5


def data_problems(attempts: Sequence[AttemptBegun], manifests: Sequence[Manifest]) -> list[str]:
    """Whether the data is still what every attempt has read, in the same order."""
    if not attempts:
        return ["the ledger has no attempt in it"]
    problems = []
    for attempt in attempts:
        read = [source.sha256 for source in attempt.sources]
        hashes = _hashes_now(attempt, manifests)
        if attempt.order != ORDER_VERSION:
            problems.append(
                f"attempt {attempt.attempt} was made by a farspan that put the documents in "
                f"another order (rule {attempt.order}, here {ORDER_VERSION}): audit it with "
                "that version"
            )
        if read != hashes:
            folders = ", ".join(manifest.store.name for manifest in manifests)
            problems.append(
                f"attempt {attempt.attempt} has read other shards than those of {folders} (sha256 "
                f"{read} instead of {hashes}): restore them to audit the run"
            )
        if attempt.seed != attempts[0].seed:
            problems.append(
                f"attempt {attempt.attempt} has used data.seed={attempt.seed}, and attempt "
                f"{attempts[0].attempt} data.seed={attempts[0].seed}: the orders do not go together"
            )
    return problems


def _hashes_now(attempt: AttemptBegun, manifests: Sequence[Manifest]) -> list[str]:
    """Of a growing source, that of the shards that were begun then."""
    begun = [source.shards for source in attempt.sources]
    if len(begun) != len(manifests):
        return [manifest.sha256 for manifest in manifests]
    return [
        manifest.prefix_sha256(min(len(manifest.shards), len(manifest.shards) if n is None else n))
        for manifest, n in zip(manifests, begun, strict=True)
    ]


def mixture_of(
    attempt: AttemptBegun, paths: Sequence[str], documents: Sequence[Documents]
) -> Mixture:
    """The mixture that an attempt has read, from its beginning."""
    names = [field.name for field in fields(Source) if field.name != "path"]
    sources = [
        Source(path, **{name: getattr(source, name) for name in names})
        for path, source in zip(paths, attempt.sources, strict=True)
    ]
    return Mixture(
        documents,
        sources,
        attempt.seed,
        shuffle_shards=attempt.shuffle_shards,
        curriculum=[WeightsFrom(first, weights) for first, weights in attempt.curriculum],
    )


class StepsCheck:
    """Steps are consecutive. A skipped batch has the number of the step that comes next.

    Attributes:
        last: the last step that was trained.
    """

    def __init__(self) -> None:
        self.last = 0
        self._found: list[str] = []

    def see(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> None:
        if batch.step > self.last + 1:
            first, last = self.last + 1, batch.step - 1
            self._found.append(
                f"step {first} has no record"
                if first == last
                else f"steps {first} to {last} have no record"
            )
        elif batch.step <= self.last:
            self._found.append(f"step {batch.step} stands again behind step {self.last}")
        self.last = batch.step - isinstance(batch, Skipped)

    def problems(self) -> list[str]:
        return _first(self._found)


class OrderCheck:
    """The batches are those that the mixture delivers, piece by piece.

    The mixture is computed again from the beginning, with the weights of each attempt; no cursor
    that was saved is used.
    """

    def __init__(self, paths: Sequence[str], documents: Sequence[Documents]) -> None:
        self._paths = paths
        self._documents = documents
        self._lanes: Lanes | None = None
        self._attempt: AttemptBegun | None = None
        self._tokens = 0
        self._difference: str | None = None

    def see(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> None:
        if self._difference:
            return
        if batch.first_token != self._tokens:
            between = batch.first_token - self._tokens
            self._difference = (
                f"step {batch.step} begins at token {batch.first_token:,} of the "
                + (
                    f"stream: the {between:,} tokens before it have no record"
                    if between > 0
                    else f"stream, {-between:,} tokens before the end of the step before it"
                )
            )
            return
        lanes = self._lanes_of(attempt, batch)
        self._difference = self._compare(batch.step, lanes.next(batch.rows, batch.seq_len), pieces)
        self._tokens = batch.stop_token

    def problems(self) -> list[str]:
        return [self._difference] if self._difference else []

    def _lanes_of(self, attempt: AttemptBegun, batch: Batch) -> Lanes:
        rows = attempt.lane_rows(batch.step)
        if attempt is not self._attempt or not self._lanes or rows != self._lanes.rows:
            lanes = Lanes(mixture_of(attempt, self._paths, self._documents), rows)
            if self._lanes:
                lanes.load_state_dict(self._lanes.state_dict(), batch.seq_len)
            self._lanes, self._attempt = lanes, attempt
        return self._lanes

    def _compare(self, step: int, expected: BatchPlan, found: Ints) -> str | None:
        if np.array_equal(expected.pieces, found):
            return None
        both = min(len(expected.pieces), len(found))
        differs = (expected.pieces[:both] != found[:both]).any(axis=1)
        place = int(differs.argmax()) if differs.any() else both
        row = int(np.searchsorted(expected.row_starts, place, side="right")) - 1
        return (
            f"step {step}, row {row}: the mixture has {self._name(expected.pieces, place)}; the "
            f"ledger has {self._name(found, place)}"
        )

    def _name(self, pieces: Ints, place: int) -> str:
        if place >= len(pieces):
            return "nothing more"
        source, document, start, stop = pieces[place].tolist()
        known = 0 <= source < len(self._paths)
        path = self._paths[source] if known else f"number {source}, which is not there"
        return f"tokens {start} to {stop} of document {document} of source {path}"


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
        return _first(self._wrong)

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


class CheckpointCheck:
    """A resumed run goes on right behind a batch of the ledger: none lost, none again.

    Args:
        progress: that of the newest checkpoint, if there is one.
    """

    def __init__(self, progress: Mapping[str, Any] | None) -> None:
        self._progress = progress
        self._delivered: Ints | None = None
        self._last = 0
        self._tokens = 0
        self._is_found = progress is None or progress["step"] == 0
        if progress:
            stream = progress["stream"]
            self._cursors = np.array([cursor["tokens"] for cursor in stream["cursors"]], np.int64)
            if lanes := stream.get("lanes"):
                self._cursors += np.array(lanes["delivered"], np.int64)

    def see(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> None:
        self._last = batch.step - isinstance(batch, Skipped)
        if self._progress is None or self._is_found:
            return
        if self._delivered is None:
            self._delivered = np.zeros_like(self._cursors)
        tokens = pieces[:, 3] - pieces[:, 2]
        known = (pieces[:, 0] >= 0) & (pieces[:, 0] < len(self._cursors))
        np.add.at(self._delivered, pieces[known, 0], tokens[known])
        if np.array_equal(self._delivered, self._cursors):
            self._is_found = self._progress["step"] == self._last

    def problems(self) -> list[str]:
        if self._progress is None or self._is_found:
            return []
        step = self._progress["step"]
        if step > self._last:
            return [
                f"the newest checkpoint is that of step {step}, and the ledger ends with step "
                f"{self._last}: its last records are lost"
            ]
        return [
            f"the newest checkpoint, of step {step}, goes on after {self._cursors.tolist()} tokens "
            "of the sources; by the ledger, that is not where the step has ended"
        ]


class MetricsCheck:
    """metrics.jsonl has the losses and gradient norms of the ledger, bit for bit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._logged = _Numbers()
        self._recorded = _Numbers()
        for row in read_metrics(path) if path.is_file() else ():
            if "train/loss" in row:
                self._logged.add(row["train/step"], row["train/loss"], row["train/grad_norm"])

    def see(self, attempt: AttemptBegun, batch: Batch, pieces: Ints) -> None:
        self._recorded.add(batch.step, batch.loss, batch.grad_norm)

    def problems(self) -> list[str]:
        logged, recorded = self._logged, self._recorded
        steps, logged_steps = np.asarray(recorded.step), np.asarray(logged.step)
        # Of records of one step the last: it is the one that was trained.
        place = np.searchsorted(steps, logged_steps, side="right") - 1
        found = []
        for row, at in enumerate(place.tolist()):
            step = logged.step[row]
            if at < 0 or recorded.step[at] != step:
                found.append(f"{self._path}: step {step} is not in the ledger")
                continue
            for name in ("loss", "grad_norm"):
                ours, theirs = getattr(logged, name)[row], getattr(recorded, name)[at]
                # NaN, which has many bit patterns and one name in JSON, differs from itself.
                if ours != theirs and not (ours != ours and theirs != theirs):
                    found.append(
                        f"{self._path}: train/{name} of step {step} is {ours!r}, in the ledger "
                        f"{theirs!r}"
                    )
        return _first(found)


class _Numbers:
    """Loss and gradient norm by step, 24 bytes each."""

    def __init__(self) -> None:
        self.step = array("q")
        self.loss = array("d")
        self.grad_norm = array("d")

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        self.step.append(step)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)


def _first(problems: list[str]) -> list[str]:
    more = len(problems) - TOLD_AT_MOST
    return problems if more <= 0 else [*problems[:TOLD_AT_MOST], f"and {more:,} more of this kind"]
