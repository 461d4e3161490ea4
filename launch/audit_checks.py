"""What an audit checks, batch by batch, in the order of the stream.

Each check sees all batches that count, and then tells what does not hold.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.lanes import Lanes
from data_pipeline.mixture import Mixture
from data_pipeline.order import Documents
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
        return first_few(self._found)


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
        return first_few(found)


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


def first_few(problems: list[str]) -> list[str]:
    more = len(problems) - TOLD_AT_MOST
    return problems if more <= 0 else [*problems[:TOLD_AT_MOST], f"and {more:,} more of this kind"]
