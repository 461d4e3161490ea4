"""The ledger comes back as it was written, or an error says where it does not."""

import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Mixture
from data_pipeline.pack import plan_rows
from data_pipeline.stream import ORDER_VERSION, BatchPlan, Source
from pretrain.errors import FencedError
from pretrain.guard import Past
from pretrain.ledger import (
    AttemptBegun,
    Ledger,
    LedgerError,
    LedgerSource,
    RollbackBegun,
    RolledBack,
    Skipped,
    Trained,
    read_ledger,
)
from pretrain.lineage import past_of_guard, read_lineage, skipped_ranges
from tests.unit.data_pipeline.plain_order import listed

SOURCES = [
    LedgerSource("ab" * 32, 0.1, max_epochs=3.4, upsample={8192: 2.5}, name="web"),
    LedgerSource("cd" * 32, 1 / 3, growing=True, shards=64),
]
CURRICULUM = ((10**9, {"web": 0.5}),)
SEED = 2**40
ROWS, SEQ_LEN = 2, 8
TOKENS = ROWS * SEQ_LEN
PLAN = BatchPlan(
    np.array([[0, 3, 5, 13], [1, 2**40, 0, 3], [0, 0, 70_000, 70_005]], np.int64),
    np.array([0, 1, 3]),
)

floats = st.one_of(
    st.floats(), st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("d", struct.pack("Q", n))[0])
)


def begin(
    path: Path,
    attempt: int = 1,
    step: int = 0,
    first_token: int = 0,
    fence: Callable[[], None] = lambda: None,
) -> Ledger:
    return Ledger.open(
        path,
        attempt,
        step,
        first_token,
        seed=SEED,
        sources=SOURCES,
        shuffle_shards=8,
        curriculum=CURRICULUM,
        fence=fence,
    )


def begun_as(attempt: int) -> AttemptBegun:
    return AttemptBegun(attempt, 0, 0, SEED, tuple(SOURCES), 8, CURRICULUM, ORDER_VERSION)


def write_one_of_each(path: Path) -> None:
    ledger = begin(path)
    ledger.train(1, PLAN, SEQ_LEN, 0, 2.5, 0.1)
    ledger.skip(2, PLAN, SEQ_LEN, TOKENS, "the loss is nan", float("nan"), 1.0)
    ledger.begin_rollback(2, "a spike", 1, (3, 2**60), 4, 2**40)
    ledger.roll_back(2, 1, TOKENS)


def bits(number: float) -> bytes:
    return struct.pack("d", number)


def offsets(path: Path) -> list[int]:
    """Where the records begin, and the end of the file; read without the module."""
    content, at = path.read_bytes(), len(b"farspan ledger 1\n")
    found = [at]
    while at < len(content):
        at += 12 + struct.unpack_from("<I", content, at)[0]
        found.append(at)
    return found


@given(
    batches=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 70), floats, floats, st.none() | st.text()),
        max_size=8,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_records_come_back_bit_for_bit(tmp_path_factory, batches, seed):
    path = tmp_path_factory.mktemp("ledger") / "ledger.bin"
    draw = np.random.default_rng(seed)
    documents = [listed([draw.integers(1, 60, 30)]), listed([draw.integers(1, 900, 5)])]
    mixture = Mixture(documents, [Source("a", 0.7), Source("b", 0.3)], seed)
    ledger = begin(path, 7)
    written, token = [], 0
    for step, (rows, seq_len, loss, norm, reason) in enumerate(batches, 1):
        plan = plan_rows(mixture, rows, seq_len)
        if reason is None:
            ledger.train(step, plan, seq_len, token, loss, norm)
        else:
            ledger.skip(step, plan, seq_len, token, reason, loss, norm)
        written.append((step, token, rows, seq_len, plan, loss, norm, reason))
        token += rows * seq_len
    begun, *records = read_ledger(path)
    assert begun == begun_as(7)
    assert len(records) == len(written)
    for record, (step, first, rows, seq_len, plan, loss, norm, reason) in zip(
        records, written, strict=True
    ):
        assert isinstance(record, Trained if reason is None else Skipped)
        assert reason is None or record.reason == reason
        assert (record.attempt, record.step, record.first_token) == (7, step, first)
        assert (record.rows, record.seq_len) == (rows, seq_len)
        assert bits(record.loss) + bits(record.grad_norm) == bits(loss) + bits(norm)
        assert np.array_equal(record.plan().pieces, plan.pieces)
        assert np.array_equal(record.plan().row_starts, plan.row_starts)
        assert record.plan().checksum == plan.checksum


def test_a_record_that_was_being_written_is_cut_off_and_no_other(tmp_path):
    whole = tmp_path / "whole.bin"
    write_one_of_each(whole)
    content, records, ends = whole.read_bytes(), list(read_ledger(whole)), offsets(whole)
    path = tmp_path / "ledger.bin"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        left = records[: sum(end <= size for end in ends[1:])]
        assert repr(list(read_ledger(path))) == repr(left)
        begin(path, 2)
        *before, last = read_ledger(path)
        assert repr(before) == repr(left)
        assert last == begun_as(2)


def test_zeros_that_a_failed_machine_left_at_the_end_are_cut_off(tmp_path):
    path = tmp_path / "ledger.bin"
    write_one_of_each(path)
    records = list(read_ledger(path))
    for zeros in (5, 12, 5000):
        with path.open("ab") as file:
            file.write(bytes(zeros))
        assert repr(list(read_ledger(path))) == repr(records)
        begin(path, 1)
        records = list(read_ledger(path))


def test_every_damaged_byte_is_found_and_its_record_named(tmp_path):
    whole = tmp_path / "whole.bin"
    write_one_of_each(whole)
    content, begins = whole.read_bytes(), [0, *offsets(whole)]
    path = tmp_path / "ledger.bin"
    for at in range(len(content)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[at] ^= change
            path.write_bytes(damaged)
            where = rf"{path}: .*at byte {max(begin for begin in begins if begin <= at)}[ ,]"
            with pytest.raises(LedgerError, match=where):
                list(read_ledger(path))
            with pytest.raises(LedgerError, match=where):
                begin(path, 2)
            assert path.read_bytes() == damaged


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_leaves_whole_records_and_is_told(tmp_path, room):
    path = tmp_path / "ledger.bin"
    ledger = begin(path)
    ledger.train(1, PLAN, SEQ_LEN, 0, 2.5, 0.1)
    before = path.read_bytes()
    with (
        files_of_at_most(len(before) + room),
        pytest.raises(LedgerError, match=rf"{path}: only {room} of \d+ bytes .*Make room"),
    ):
        ledger.train(2, PLAN, SEQ_LEN, TOKENS, 2.5, 0.1)
    assert path.read_bytes() == before
    ledger.train(2, PLAN, SEQ_LEN, TOKENS, 2.5, 0.1)
    assert [record.step for record in read_ledger(path)] == [0, 1, 2]


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(LedgerError, match=r"gone/ledger\.bin: cannot be opened"):
        begin(tmp_path / "gone" / "ledger.bin")


def test_a_plan_that_does_not_fill_its_rows_is_a_bug(tmp_path):
    ledger = begin(tmp_path / "ledger.bin")
    for pieces, row_starts in (
        ([[0, 3, 5, 12]], [0, 1]),
        ([[0, 3, 5, 14]], [0, 1]),
        ([[0, 3, 0, 4], [0, 3, 4, 16]], [0, 1, 2]),
    ):
        with pytest.raises(ValueError, match="do not fill"):
            ledger.train(1, BatchPlan(np.array(pieces), np.array(row_starts)), 8, 0, 1.0, 1.0)


def test_an_attempt_that_was_replaced_writes_nothing_more(tmp_path):
    path = tmp_path / "ledger.bin"
    newest = 1

    def fence() -> None:
        if newest != 1:
            raise FencedError("attempt 2 has begun")

    old = begin(path, fence=fence)
    old.train(1, PLAN, SEQ_LEN, 0, 2.5, 0.1)
    newest, before = 2, path.read_bytes()
    for write in (
        lambda: old.train(2, PLAN, SEQ_LEN, TOKENS, 2.5, 0.1),
        lambda: old.begin_rollback(1, "a spike", 0, (0, 0), 1, 0),
        lambda: old.roll_back(1, 0, 0),
        lambda: begin(path, fence=fence),
    ):
        with pytest.raises(FencedError):
            write()
    assert path.read_bytes() == before


def test_what_a_replaced_attempt_wrote_late_does_not_count(tmp_path):
    path = tmp_path / "ledger.bin"
    old = begin(path, 1)
    old.train(1, PLAN, SEQ_LEN, 0, 2.5, 0.1)
    new = begin(path, 2, 1, TOKENS)
    old.train(2, PLAN, SEQ_LEN, TOKENS, 9.0, 9.0)
    new.train(2, PLAN, SEQ_LEN, TOKENS, 2.0, 0.1)
    old.roll_back(2, 0, 0)
    lineage = read_lineage(path)
    assert [(record.step, record.loss) for _, record in lineage.batches()] == [(1, 2.5), (2, 2.0)]
    assert lineage.late == 2
    with pytest.raises(LedgerError, match="attempt 2 has begun there already, and attempt 1"):
        begin(path, 1)


@dataclass
class Model:
    """What a run does, kept as plain lists."""

    ledger: Ledger
    counted: list[tuple[int, int, bool]] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=lambda: {"restart": 0, "rollback": 0})
    token: int = 0
    step: int = 0

    def deliver(self, is_skipped: bool) -> None:
        number = self.step + 1
        if is_skipped:
            self.ledger.skip(number, PLAN, SEQ_LEN, self.token, "why", 1.0, 1.0)
            self.ranges.append((self.token, self.token + TOKENS))
        else:
            self.ledger.train(number, PLAN, SEQ_LEN, self.token, 1.0, 1.0)
        self.counted.append((number, self.token, is_skipped))
        self.token += TOKENS
        self.step += not is_skipped

    def go_back(self, batches: int, cause: str) -> tuple[int, int]:
        """Forget the last batches; returns the steps before and after."""
        before = self.step
        for number, token, is_skipped in reversed(self.counted[len(self.counted) - batches :]):
            self.step, self.token = number - 1, token
            self.lost[cause] += not is_skipped
        del self.counted[len(self.counted) - batches :]
        return before, self.step


events = st.tuples(
    st.sampled_from(["train", "train", "train", "skip", "restart", "rollback"]),
    st.integers(0, 6),
)


@given(events=st.lists(events, max_size=40))
@settings(max_examples=150, deadline=None)
def test_what_counts_after_restarts_and_rollbacks(tmp_path_factory, events):
    path = tmp_path_factory.mktemp("lineage") / "ledger.bin"
    model, attempt = Model(begin(path)), 1
    for event, number in events:
        if event == "restart":
            _, step = model.go_back(min(number, len(model.counted)), event)
            attempt += 1
            model.ledger = begin(path, attempt, step, model.token)
        elif event == "rollback":
            before, step = model.go_back(min(number, len(model.counted)), event)
            skip = model.token, model.token + number * TOKENS
            model.ledger.begin_rollback(before, "a spike", step, skip, 1, 0)
            model.ledger.roll_back(before, step, model.token)
            model.ranges.append(skip)
        else:
            model.deliver(event == "skip")
    lineage = read_lineage(path)
    batches = list(lineage.batches())
    assert [
        (record.step, record.first_token, isinstance(record, Skipped)) for _, record in batches
    ] == model.counted
    assert all(attempt.attempt == record.attempt for attempt, record in batches)
    assert len(lineage.kept) == len(batches)
    assert len(lineage.attempts) == attempt
    assert lineage.late == 0
    undone = lineage.undone_by_restarts, lineage.undone_by_rollbacks
    assert [each.steps for each in undone] == [*model.lost.values()]
    assert [each.tokens for each in undone] == [TOKENS * lost for lost in model.lost.values()]

    tokens = {t for first, stop in model.ranges for t in range(first, stop)}
    ranges = skipped_ranges(read_ledger(path))
    assert {t for first, stop in ranges for t in range(first, stop)} == tokens
    assert all(a[1] < b[0] for a, b in pairwise(ranges))


def test_a_rollback_says_from_where_to_where_and_why(tmp_path):
    write_one_of_each(tmp_path / "ledger.bin")
    *_, begun, ended = read_ledger(tmp_path / "ledger.bin")
    assert begun == RollbackBegun(1, 2, "a spike", 1, 3, 2**60, 4, 2**40)
    assert ended == RolledBack(1, 2, 1, TOKENS)


def test_a_rollback_that_was_begun_is_remembered_until_the_run_has_gone_back(tmp_path):
    path = tmp_path / "ledger.bin"
    ledger = begin(path)
    assert past_of_guard(read_ledger(path)) == Past([])
    ledger.begin_rollback(9, "a spike", 8, (TOKENS, 2 * TOKENS), 2, 77)
    pending = Past([(TOKENS, 2 * TOKENS)], nearby=2, settled_at=77, go_back_to=8)
    assert past_of_guard(read_ledger(path)) == pending
    done = replace(pending, go_back_to=None)
    ledger.roll_back(9, 8, TOKENS)
    assert past_of_guard(read_ledger(path)) == done
    ledger.begin_rollback(1, "a spike", -1, (TOKENS, 2 * TOKENS), 2, 77)
    assert past_of_guard(read_ledger(path)) == replace(pending, go_back_to=0)
    ledger.begin_rollback(9, "a spike", 7, (TOKENS, 2 * TOKENS), 2, 77)
    begin(path, 2, 7, TOKENS)
    assert past_of_guard(read_ledger(path)) == done
    # The attempt that was replaced comes too late to send the new one back.
    ledger.begin_rollback(9, "a spike", 3, (TOKENS, 2 * TOKENS), 3, 99)
    assert past_of_guard(read_ledger(path)) == done
