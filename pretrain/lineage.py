"""Which records of a ledger count, after all restarts and rollbacks."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.guard import Past
from pretrain.ledger import (
    AttemptBegun,
    Record,
    RollbackBegun,
    RolledBack,
    Skipped,
    Trained,
    read_ledger,
)


@dataclass(frozen=True)
class Undone:
    """Steps that were trained and no longer count."""

    steps: int
    tokens: int


@dataclass(frozen=True)
class Lineage:
    """The records of a ledger that count: what went into the weights as they are now.

    An attempt that goes on from the middle of another, or a rollback, undoes all that was delivered
    after the token at which it goes on.

    Attributes:
        attempts: in the order in which they began.
        undone_by_restarts: work that attempts had to do again.
        undone_by_rollbacks: work that was given up on purpose.
        late: records that an attempt wrote after another had begun; they never count.
        kept: numbers of the records that count, from 0 for the first of the file.
        attempt_of_kept: of each of them, the place in `attempts`.
    """

    path: Path
    attempts: tuple[AttemptBegun, ...]
    undone_by_restarts: Undone
    undone_by_rollbacks: Undone
    late: int
    kept: "array[int]"
    attempt_of_kept: "array[int]"

    def batches(self) -> Iterator[tuple[AttemptBegun, Trained | Skipped]]:
        """The batches that count, in the order of the stream, each with its attempt."""
        kept = iter(zip(self.kept, self.attempt_of_kept, strict=True))
        number, attempt = next(kept, (-1, 0))
        for index, record in enumerate(read_ledger(self.path)):
            if index == number and isinstance(record, Trained | Skipped):
                yield self.attempts[attempt], record
                number, attempt = next(kept, (-1, 0))


def read_lineage(path: Path) -> Lineage:
    """Find out which records of a ledger count; 32 bytes of memory for each that does.

    Raises:
        LedgerError: a byte is damaged.
    """
    attempts: list[AttemptBegun] = []
    kept, attempt_of_kept, first_token, trained_tokens = (array("q") for _ in range(4))
    late = 0

    def undo_from(token: int) -> Undone:
        steps = tokens = 0
        while first_token and first_token[-1] >= token:
            steps += trained_tokens[-1] > 0
            tokens += trained_tokens[-1]
            for column in (kept, attempt_of_kept, first_token, trained_tokens):
                column.pop()
        return Undone(steps, tokens)

    undone = {AttemptBegun: Undone(0, 0), RolledBack: Undone(0, 0)}
    for index, record in enumerate(read_ledger(path)):
        if isinstance(record, AttemptBegun):
            attempts.append(record)
        elif not attempts or record.attempt != attempts[-1].attempt:
            late += 1
            continue
        if isinstance(record, RollbackBegun):
            continue
        if isinstance(record, AttemptBegun | RolledBack):
            before, more = undone[type(record)], undo_from(record.first_token)
            undone[type(record)] = Undone(before.steps + more.steps, before.tokens + more.tokens)
        else:
            kept.append(index)
            attempt_of_kept.append(len(attempts) - 1)
            first_token.append(record.first_token)
            trained_tokens.append(record.tokens if isinstance(record, Trained) else 0)
    return Lineage(
        path,
        tuple(attempts),
        undone[AttemptBegun],
        undone[RolledBack],
        late,
        kept,
        attempt_of_kept,
    )


def skipped_ranges(records: Iterable[Record]) -> list[tuple[int, int]]:
    """[first, stop) of the stream's tokens that are skipped, sorted and joined.

    They are those of skipped batches and those that rollbacks have named. Skips that a restart or a
    rollback undid are among them: what was skipped once can be skipped again. The tokens at a place
    of the stream are the same as long as the weights of its sources are.
    """
    skipped = sorted(
        (record.skip_from, record.skip_to)
        if isinstance(record, RollbackBegun)
        else (record.first_token, record.stop_token)
        for record in records
        if isinstance(record, Skipped | RollbackBegun)
    )
    joined: list[tuple[int, int]] = []
    for first, stop in skipped:
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((first, stop))
    return joined


def past_of_guard(records: Iterable[Record]) -> Past:
    """What the guard of the next attempt has to know."""
    of_guard = [record for record in records if not isinstance(record, Trained)]
    attempt = nearby = settled_at = 0
    go_back_to: int | None = None
    for record in of_guard:
        if isinstance(record, AttemptBegun):
            attempt, go_back_to = record.attempt, None
        elif record.attempt != attempt:
            continue  # late, of an attempt that had been replaced
        elif isinstance(record, RollbackBegun):
            nearby, settled_at = record.nearby, record.settled_at
            # Older ledgers name steps before the first.
            go_back_to = max(0, record.to_step)
        elif isinstance(record, RolledBack):
            go_back_to = None
    return Past(skipped_ranges(of_guard), nearby, settled_at, go_back_to)
