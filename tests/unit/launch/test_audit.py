"""An audit passes what the mixture delivers, and names what it does not."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import TokenReader, load_manifest, write_shards
from data_pipeline.stream import BatchPlan, Source, TokenStream
from launch.audit import Audit, audit_run
from launch.prepare import prepare_run
from pretrain.checkpoint.manifest import MANIFEST, Manifest
from pretrain.checkpoint.store import Progress, checkpoint_in
from pretrain.checkpoint.target import Target
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.ledger import (
    AttemptBegun,
    Ledger,
    LedgerError,
    LedgerSource,
    Record,
    RollbackBegun,
    RolledBack,
    Skipped,
    Trained,
    read_ledger,
)
from pretrain.lineage import read_lineage
from pretrain.run_dir import RunDirectory

ROWS, SEQ_LEN = 4, 64


@pytest.fixture(scope="module")
def small(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 9 documents, which a run reads several times."""
    folder = tmp_path_factory.mktemp("small")
    texts = ((str(number), "abc def " * number * 3) for number in range(1, 10))
    write_shards(texts, shards / "tokenizer.json", folder, extra={})
    return folder


class Simulated:
    """Does to a run directory what training does, without a model."""

    def __init__(self, root: Path, paths: Iterable[Path], weights: Iterable[float]) -> None:
        self.paths = [str(path) for path in paths]
        self.weights = list(weights)
        sources = [
            {"path": path, "weight": weight}
            for path, weight in zip(self.paths, self.weights, strict=True)
        ]
        settings = [f"data.shards={json.dumps(sources)}", f"data.seq_len={SEQ_LEN}"]
        self.run = prepare_run(load_config("tiny-hybrid-moe", settings), root)
        self.rows, self.seq_len, self.attempt = ROWS, SEQ_LEN, 0
        self.lanes = [(1, 1)]
        self.saved: dict[int, dict] = {}
        self.losses = (1 / n for n in count(1))
        self.go_on_from(0)

    def go_on_from(self, step: int) -> None:
        """Start another attempt."""
        self._load(step)
        self.attempt += 1
        self.ledger = Ledger.open(
            self.run.ledger,
            self.attempt,
            step,
            self.stream.tokens,
            seed=self.stream.seed,
            sources=[
                LedgerSource(load_manifest(path).sha256, weight)
                for path, weight in zip(self.paths, self.weights, strict=True)
            ],
            lanes=self.lanes,
            fence=lambda: None,
        )

    def roll_back(self, step: int) -> None:
        before = self.step
        self._load(step)
        self.ledger.begin_rollback(before, "a spike", step, (0, 64), 1, 0)
        self.ledger.roll_back(before, step, self.stream.tokens)

    def _load(self, step: int) -> None:
        sources = [Source(*each) for each in zip(self.paths, self.weights, strict=True)]
        lane_rows = self.lanes[-1][1] if step + 1 >= self.lanes[-1][0] else 1
        self.stream, self.step = TokenStream(sources, self.seq_len, 0, lane_rows=lane_rows), step
        if step:
            self.stream.load_state_dict(self.saved[step])

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            first, plan = self.stream.tokens, self.stream.next_batch(self.rows)
            self.step += 1
            loss = next(self.losses)
            self.ledger.train(self.step, plan, self.seq_len, first, loss, 2 * loss)
            self.saved[self.step] = self.stream.state_dict()

    def skip(self) -> None:
        first, plan = self.stream.tokens, self.stream.next_batch(self.rows)
        self.ledger.skip(
            self.step + 1, plan, self.seq_len, first, "the loss is nan", math.nan, math.nan
        )
        self.saved[self.step] = self.stream.state_dict()

    def end(self) -> Audit:
        """Leave what a run leaves, and audit it."""
        with self.run.metrics.open("w") as file:
            for _, batch in read_lineage(self.run.ledger).batches():
                if isinstance(batch, Trained):
                    names = "train/step", "train/loss", "train/grad_norm"
                    row = dict(zip(names, (batch.step, batch.loss, batch.grad_norm), strict=True))
                    file.write(json.dumps(row) + "\n")
        if self.step in self.saved:
            self.save()
        return audit_run(self.run)

    def save(self) -> None:
        progress = Progress(self.step, 0, self.saved[self.step])
        folder = checkpoint_in(Target(str(self.run.checkpoints)), self.step)
        Path(str(folder)).mkdir(parents=True)
        manifest = Manifest(self.attempt, vars(progress), {})
        Path(str(folder / MANIFEST)).write_bytes(manifest.to_bytes())


@pytest.fixture
def simulated(shards: Path, small: Path, tmp_path: Path) -> Simulated:
    return Simulated(tmp_path / "run", [shards, small], [2.0, 1.0])


@pytest.fixture(scope="module")
def whole(shards: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of 24 steps with two restarts and a rollback, which holds."""
    simulated = Simulated(tmp_path_factory.mktemp("whole") / "run", [shards, small], [2.0, 1.0])
    simulated.train(8)
    simulated.go_on_from(6)
    simulated.train(9)
    simulated.roll_back(12)
    simulated.train(2)
    simulated.skip()
    simulated.go_on_from(14)
    simulated.train(10)
    assert simulated.end().problems == ()
    return simulated.run


def token_uses(run: RunDirectory, paths: Iterable[str]) -> list[Counter]:
    """How often each token of each source was delivered, counted one by one."""
    uses = [
        Counter(
            {
                (document, token): 0
                for document, length in enumerate(TokenReader(load_manifest(path)).lengths)
                for token in range(length)
            }
        )
        for path in paths
    ]
    for _, batch in read_lineage(run.ledger).batches():
        for source, document, start, stop in batch.plan().pieces.tolist():
            uses[source].update((document, token) for token in range(start, stop))
    return uses


def test_a_run_with_all_that_can_happen_holds_and_is_counted(simulated: Simulated) -> None:
    simulated.train(3)
    simulated.skip()
    simulated.train(5)
    simulated.rows, simulated.seq_len = 3, 100
    simulated.go_on_from(5)
    simulated.train(4)
    simulated.roll_back(7)
    simulated.train(1)
    simulated.skip()
    simulated.train(21)
    simulated.go_on_from(29)
    audit = simulated.end()
    assert audit.problems == ()
    assert (audit.attempts, audit.steps) == (3, 29)
    restarts, rollbacks = audit.undone_by_restarts, audit.undone_by_rollbacks
    assert (restarts.steps, restarts.tokens) == (3, 3 * ROWS * SEQ_LEN)
    assert (rollbacks.steps, rollbacks.tokens) == (2, 600)
    assert audit.trained_tokens == 5 * ROWS * SEQ_LEN + 24 * 300
    assert audit.skipped_tokens == ROWS * SEQ_LEN + 300
    trained = audit.trained_tokens
    assert audit.goodput == trained / (trained + 3 * ROWS * SEQ_LEN + 600)

    for source, uses in zip(audit.sources, token_uses(simulated.run, simulated.paths), strict=True):
        assert source.least_used == min(uses.values())
        assert source.most_used == max(uses.values())
        delivered = source.trained_tokens + sum(source.skipped_tokens.values())
        assert delivered == uses.total()
        assert source.epochs == delivered / len(uses)
        begun = sum(times for (_, token), times in uses.items() if token == 0)
        assert source.documents == begun
    assert audit.sources[1].least_used > 2
    assert sum(source.skipped_tokens["the loss is nan"] for source in audit.sources) == 556
    assert [source.mixture_share for source in audit.sources] == pytest.approx(
        [2 / 3, 1 / 3], abs=1e-3
    )


def test_lanes_hold_whatever_happens_within_them(simulated: Simulated) -> None:
    simulated.train(2)
    simulated.lanes = [(1, 1), (3, 4)]
    simulated.rows, simulated.seq_len = 2, 32
    simulated.go_on_from(2)
    simulated.train(6)
    simulated.go_on_from(5)
    simulated.train(2)
    simulated.skip()
    simulated.train(3)
    simulated.roll_back(7)
    simulated.skip()
    simulated.train(24)
    audit = simulated.end()
    assert audit.problems == ()
    # 31 batches in lanes of 4.
    assert audit.unfinished_tokens == 3 * 2 * 32
    assert audit.sources[1].least_used >= 1
    simulated.train(1)
    assert simulated.end().unfinished_tokens == 0


def test_lanes_that_were_dealt_out_in_another_way_are_named(simulated: Simulated) -> None:
    simulated.lanes = [(1, 4)]
    simulated.go_on_from(0)
    simulated.train(8)
    simulated.end()
    other = in_attempts(2, lanes=lambda record: ((1, 2),))
    rebuild(simulated.run, other(list(read_ledger(simulated.run.ledger))))
    assert any("step 1, row 1: the mixture has" in p for p in audit_run(simulated.run).problems)


def test_weights_may_change_between_attempts_and_are_then_followed(simulated: Simulated) -> None:
    simulated.train(10)
    simulated.weights = [1.0, 9.0]
    simulated.go_on_from(8)
    simulated.train(10)
    audit = simulated.end()
    assert audit.problems == ()
    # By the new weights it would be 0.9, by the old ones 0.33.
    assert 0.4 < audit.sources[1].share < 0.8


def rebuild(run: RunDirectory, records: Iterable[Record]) -> None:
    """Write the ledger anew, with checksums that are right."""
    run.ledger.unlink()
    for record in records:
        if isinstance(record, AttemptBegun):
            ledger = Ledger.open(
                run.ledger,
                record.attempt,
                record.step,
                record.first_token,
                seed=record.seed,
                sources=record.sources,
                lanes=record.lanes,
                fence=lambda: None,
            )
        elif isinstance(record, RollbackBegun):
            skip = record.skip_from, record.skip_to
            ledger.begin_rollback(
                record.step,
                record.reason,
                record.to_step,
                skip,
                record.nearby,
                record.settled_at,
            )
        elif isinstance(record, RolledBack):
            ledger.roll_back(record.from_step, record.to_step, record.first_token)
        else:
            batch = record.step, record.plan(), record.seq_len, record.first_token
            numbers = record.loss, record.grad_norm
            if isinstance(record, Skipped):
                ledger.skip(*batch, record.reason, *numbers)
            else:
                ledger.train(*batch, *numbers)


def in_step(step: int, change: Callable[[Trained], list[Trained]]) -> Callable:
    """Change the last record of a step."""

    def changed(records: list[Record]) -> list[Record]:
        at = max(n for n, r in enumerate(records) if isinstance(r, Trained) and r.step == step)
        return [*records[:at], *change(records[at]), *records[at + 1 :]]

    return changed


def with_pieces(change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def changed(record: Trained) -> list[Trained]:
        pieces = change(record.plan().pieces.copy())
        other = replace(record)
        object.__setattr__(other, "plan", lambda: BatchPlan(pieces, record.plan().row_starts))
        return [other]

    return changed


def another_document(pieces: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(pieces[:, 2] == 0)[0]
    pieces[at, 1] = (pieces[at, 1] + 1) % 9
    return pieces


def another_source(pieces: np.ndarray) -> np.ndarray:
    pieces[-1, 0] = 1 - pieces[-1, 0]
    return pieces


def later_tokens(pieces: np.ndarray) -> np.ndarray:
    pieces[0, 2:] += 1
    return pieces


def no_such_document(pieces: np.ndarray) -> np.ndarray:
    pieces[0, 1] = 10**6
    return pieces


def exchange_steps(records: list[Record]) -> list[Record]:
    """Steps 20 and 21 have trained each other's tokens."""
    a, b = (
        max(n for n, r in enumerate(records) if isinstance(r, Trained) and r.step == step)
        for step in (20, 21)
    )
    exchanged = list(records)
    exchanged[a] = replace(records[b], step=20, first_token=records[a].first_token)
    exchanged[b] = replace(records[a], step=21, first_token=records[b].first_token)
    return exchanged


def in_attempts(*numbers: int, **changes: Callable) -> Callable:
    """Change fields of what some attempts say of themselves."""

    def changed(record: Record) -> Record:
        if isinstance(record, AttemptBegun) and record.attempt in numbers:
            return replace(record, **{name: of(record) for name, of in changes.items()})
        return record

    return lambda records: [changed(record) for record in records]


def with_weights(*weights: float) -> Callable:
    return lambda record: tuple(
        replace(source, weight=weight)
        for source, weight in zip(record.sources, weights, strict=True)
    )


def other_shards(record: AttemptBegun) -> tuple[LedgerSource, ...]:
    return (LedgerSource("0" * 64, 2.0), *record.sources[1:])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (in_step(3, lambda record: []), "step 3 has no record"),
        (in_step(3, lambda record: []), "step 4 begins at token 768 .* 256 tokens before it have"),
        (in_step(24, lambda record: []), "newest checkpoint is that of step 24, and .* step 23"),
        (in_step(20, lambda record: [record, record]), "step 20 stands again behind step 20"),
        (in_step(20, lambda record: [record, record]), "step 20 begins .* 256 tokens before the"),
        (in_step(20, lambda record: [record, record]), "goes on at token .*, after it was used"),
        (
            in_step(19, with_pieces(another_document)),
            r"step 19, row 1: the mixture has tokens 0 to \d+ of document \d+ of source .*; the "
            r"ledger has tokens 0 to \d+ of document \d+ of source",
        ),
        (in_step(20, with_pieces(another_source)), "step 20, row 3: the mixture has"),
        (in_step(20, with_pieces(later_tokens)), "step 20, row 0: the mixture has"),
        (in_step(20, with_pieces(later_tokens)), "step 20: document .* after it was used up to"),
        (in_step(20, with_pieces(no_such_document)), "step 20: source .* has no tokens"),
        (exchange_steps, "step 20, row 0"),
        (in_step(20, lambda record: [record, record]), "used between 0 and 2 times; in .* 0 to 1"),
        (in_attempts(3, sources=with_weights(1, 1)), "step 1[5-9], row "),
        (in_attempts(1, 2, 3, sources=with_weights(1, 9)), "has delivered .* by its weight it"),
        (in_attempts(1, sources=other_shards), "attempt 1 has read other shards .* restore them"),
        (in_attempts(2, seed=lambda record: 1), r"attempt 2 has used data\.seed=1, and attempt 1"),
        (
            in_step(20, lambda record: [replace(record, loss=math.nextafter(record.loss, 9))]),
            "train/loss of step 20 is .*, in the ledger",
        ),
        (
            in_step(20, lambda record: [replace(record, grad_norm=math.nan)]),
            "train/grad_norm of step 20 is .*, in the ledger nan",
        ),
    ],
)
def test_what_does_not_hold_is_named(
    whole: RunDirectory, tmp_path: Path, change: Callable, problem: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(whole.root, run.root)
    records = list(read_ledger(run.ledger))
    rebuild(run, records)
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()
    rebuild(run, change(records))
    problems = audit_run(run).problems
    assert any(re.search(problem, text) for text in problems), problems


def test_a_checkpoint_that_goes_on_elsewhere_is_named(simulated: Simulated) -> None:
    simulated.train(6)
    simulated.saved[6] = simulated.saved[5]
    (problem,) = simulated.end().problems
    assert re.search("newest checkpoint, of step 6, goes on after .* not where", problem)


def test_a_step_that_only_the_metrics_know_is_named(simulated: Simulated) -> None:
    simulated.train(6)
    simulated.end()
    with simulated.run.metrics.open("a") as file:
        file.write('{"train/step": 7, "train/loss": 1.0, "train/grad_norm": 1.0}\n')
    (problem,) = audit_run(simulated.run).problems
    assert "metrics.jsonl: step 7 is not in the ledger" in problem


def test_a_run_without_a_ledger_and_a_damaged_one_are_told_apart(simulated: Simulated) -> None:
    simulated.train(2)
    content = bytearray(simulated.run.ledger.read_bytes())
    content[-1] ^= 1
    simulated.run.ledger.write_bytes(content)
    with pytest.raises(LedgerError, match="is damaged"):
        audit_run(simulated.run)
    simulated.run.ledger.unlink()
    with pytest.raises(UserError, match=r"has no ledger\.bin"):
        audit_run(simulated.run)
