"""RUN/ledger.bin: which tokens were trained at which step, over all attempts of a run.

Rank 0 appends a record for each attempt that begins, each global batch that is trained or skipped,
and each rollback; nothing is ever rewritten. The file is one line that names the format, and then
records: a frame of 12 bytes (length of the payload, its crc32, the crc32 of these 8 bytes) and the
payload. So the end of a file whose writer was killed cannot be taken for damage, nor the reverse.

A batch is kept as it was planned, run by run of a document's tokens: 4.7 bytes per document where
batches of 4M tokens are drawn from 10M documents, 5.1 for 1M tokens from 3.5M documents, and about
75 bytes per step.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream import DEFAULT_SHUFFLE_SHARDS, ORDER_VERSION, BatchPlan
from pretrain.errors import TrainingError
from pretrain.run_dir import sync_folder

MAGIC = b"farspan ledger 1\n"
_FRAME = struct.Struct("<III")
_FRAME_CHECKED = _FRAME.size - 4
# Kind, attempt, step, first token, rows, seq_len, loss, gradient norm, bytes of the reason.
_BATCH = struct.Struct("<BIQQIIddH")
_ATTEMPT_BEGUN, _TRAINED, _SKIPPED, _ROLLED_BACK, _ROLLBACK_BEGUN = range(1, 6)
_ZEROS_AT_A_TIME = 1 << 20


class LedgerError(TrainingError):
    """The ledger is damaged, or cannot be written: told without a traceback."""


@dataclass(frozen=True)
class LedgerSource:
    """What an attempt reads as one source, and how much of it.

    Attributes:
        sha256: of its shards; of those that were begun by then if it grows.
        shards: how many these are; None: all.
        weight, epochs, max_epochs, upsample, growing, name: as in the configuration.
    """

    sha256: str
    weight: float | None
    epochs: float | None = None
    max_epochs: float | None = None
    upsample: Mapping[int, float] = field(default_factory=dict)
    growing: bool = False
    name: str = ""
    shards: int | None = None

    def __post_init__(self) -> None:
        # JSON has no other keys than words.
        upsample = {int(least): times for least, times in self.upsample.items()}
        object.__setattr__(self, "upsample", upsample)


@dataclass(frozen=True)
class AttemptBegun:
    """An attempt goes on after `step` steps: later ones of earlier attempts no longer count.

    Attributes:
        first_token: how many tokens the stream has delivered up to there.
        seed, shuffle_shards: of the order of documents.
        curriculum: (first token, weights by the names of sources).
        order: by which rule documents follow each other.
        lanes: (first step, rows of a lane) as `context.lane_rows` has it from that step on.
    """

    attempt: int
    step: int
    first_token: int
    seed: int
    sources: tuple[LedgerSource, ...]
    shuffle_shards: int = 0
    curriculum: tuple[tuple[int, Mapping[str, float]], ...] = ()
    order: int = 1
    lanes: tuple[tuple[int, int], ...] = ((1, 1),)

    def lane_rows(self, step: int) -> int:
        """Rows of a lane in a batch that is tried as `step`."""
        return next(rows for first, rows in reversed(self.lanes) if first <= step)


@dataclass(frozen=True)
class RollbackBegun:
    """A batch that was tried as `step` was a spike, and the run is about to go back. If it ends
    before it has, its next attempt goes back.

    Attributes:
        to_step: it goes back to this step, or before.
        skip_from, skip_to: [from, to) of the stream's tokens, which are skipped from now on.
        nearby: the rollbacks for spikes at this place so far, this one among them.
        settled_at: a spike at this token of the stream or later is one at another place.
    """

    attempt: int
    step: int
    reason: str
    to_step: int
    skip_from: int
    skip_to: int
    nearby: int
    settled_at: int


@dataclass(frozen=True)
class RolledBack:
    """Within an attempt, the run went back from after `from_step` to after `to_step`.

    Attributes:
        first_token: how many tokens the stream has delivered up to `to_step`.
    """

    attempt: int
    from_step: int
    to_step: int
    first_token: int


@dataclass(frozen=True)
class Delivered:
    """A global batch that the stream delivered.

    Attributes:
        first_token: how many tokens the stream had delivered before it.
        packed: what fills its rows; `plan` unpacks it.
    """

    attempt: int
    step: int
    first_token: int
    rows: int
    seq_len: int
    loss: float
    grad_norm: float
    packed: bytes = field(repr=False)

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def stop_token(self) -> int:
        return self.first_token + self.tokens

    def plan(self) -> BatchPlan:
        return _split(_unpack(self.packed), self.rows, self.seq_len)


class Trained(Delivered):
    """A global batch whose gradient went into the weights, as step `step`."""


@dataclass(frozen=True)
class Skipped(Delivered):
    """A global batch that left the weights as they were, and why. The next batch was tried in its
    stead, so that its step is that of the next one. Loss and gradient norm are NaN where they were
    not computed.
    """

    reason: str


Record = AttemptBegun | Trained | Skipped | RollbackBegun | RolledBack


class Ledger:
    """Appends to a ledger. One process, rank 0's, has it open.

    A record goes straight to the file: a killed process loses at most the one it was writing. A
    machine that fails loses what came after the last `sync`.
    """

    def __init__(self, path: Path, attempt: int, fence: Callable[[], None]) -> None:
        self.path = path
        self._attempt = attempt
        self._fence = fence
        try:
            self._end = _end_of_whole_records(path, attempt)
            # Reading a long one takes a while.
            fence()
            self._file = path.open("ab", buffering=0)
            self._file.truncate(self._end)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be opened: {error.strerror}") from error

    @classmethod
    def open(
        cls,
        path: Path,
        attempt: int,
        step: int,
        first_token: int,
        *,
        seed: int,
        sources: Sequence[LedgerSource],
        shuffle_shards: int = DEFAULT_SHUFFLE_SHARDS,
        curriculum: Sequence[tuple[int, Mapping[str, float]]] = (),
        lanes: Sequence[tuple[int, int]] = ((1, 1),),
        fence: Callable[[], None],
    ) -> "Ledger":
        """Cut off a torn last record, and record that `attempt` goes on after `step` steps.

        All records are read and verified, 0.6 GB/s on one core.

        Args:
            first_token: how many tokens the stream has delivered up to `step`.
            fence: raises if `attempt` may no longer write; called before each change of the file.

        Raises:
            LedgerError: the file is damaged, of a newer attempt, or cannot be written.
        """
        ledger = cls(path, attempt, fence)
        if ledger._end == 0:
            ledger._write(MAGIC)
            sync_folder(path.parent)
        mixture = tuple(sources), shuffle_shards, tuple(curriculum), ORDER_VERSION, tuple(lanes)
        begun = AttemptBegun(attempt, step, first_token, seed, *mixture)
        ledger._append(_json_payload(_ATTEMPT_BEGUN, begun))
        return ledger

    def train(
        self,
        step: int,
        plan: BatchPlan,
        seq_len: int,
        first_token: int,
        loss: float,
        grad_norm: float,
    ) -> None:
        """Record that `plan` was trained as step `step`."""
        self._batch(_TRAINED, step, plan, seq_len, first_token, loss, grad_norm, "")

    def skip(
        self,
        step: int,
        plan: BatchPlan,
        seq_len: int,
        first_token: int,
        reason: str,
        loss: float,
        grad_norm: float,
    ) -> None:
        """Record that `plan`, which would have been step `step`, left the weights as they were."""
        self._batch(_SKIPPED, step, plan, seq_len, first_token, loss, grad_norm, reason)

    def begin_rollback(
        self,
        step: int,
        reason: str,
        to_step: int,
        skip: tuple[int, int],
        nearby: int,
        settled_at: int,
    ) -> None:
        """Record durably that the run is about to go back; see `RollbackBegun`."""
        record = RollbackBegun(self._attempt, step, reason, to_step, *skip, nearby, settled_at)
        self._append(_json_payload(_ROLLBACK_BEGUN, record))
        self.sync()

    def roll_back(self, from_step: int, to_step: int, first_token: int) -> None:
        """Record that the run has gone back: the steps after `to_step` no longer count.

        Args:
            first_token: how many tokens the stream has delivered up to `to_step`.
        """
        record = RolledBack(self._attempt, from_step, to_step, first_token)
        self._append(_json_payload(_ROLLED_BACK, record))

    def sync(self) -> None:
        """Make all records durable; a checkpoint may be committed only after that."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be made durable: {error.strerror}") from error

    def _batch(
        self,
        kind: int,
        step: int,
        plan: BatchPlan,
        seq_len: int,
        first_token: int,
        loss: float,
        grad_norm: float,
        reason: str,
    ) -> None:
        rows = len(plan.row_starts) - 1
        runs = _join(plan.pieces)
        if not _is_cut_by_rows(plan, runs, rows, seq_len):
            raise ValueError(f"step {step}: the pieces do not fill {rows} rows of {seq_len} tokens")
        words = reason.encode()
        numbers = step, first_token, rows, seq_len, loss, grad_norm
        head = _BATCH.pack(kind, self._attempt, *numbers, len(words))
        self._append(head + words + _pack(runs))

    def _append(self, payload: bytes) -> None:
        self._fence()
        self._write(_framed(payload))

    def _write(self, content: bytes) -> None:
        written = 0
        try:
            while written < len(content):
                written += self._file.write(content[written:])
        except OSError as error:
            raise self._cut_back(error, written, len(content)) from error
        self._end += len(content)

    def _cut_back(self, error: OSError, written: int, wanted: int) -> LedgerError:
        """Remove the half-written record, and say what happened."""
        try:
            self._file.truncate(self._end)
            state = f"it ends with its last whole record again, at byte {self._end}"
        except OSError as second:
            state = f"its half-written end could not be cut off ({second.strerror})"
        return LedgerError(
            f"{self.path}: only {written} of {wanted} bytes of a record could be written "
            f"({error.strerror}); {state}. Make room; the same command goes on from the newest "
            "checkpoint"
        )


def read_ledger(path: Path) -> Iterator[Record]:
    """All records in the order in which they were written; a torn last one is left out.

    Raises:
        LedgerError: a byte is damaged; names the file and the offset of the record.
    """
    for offset, payload in _payloads(path):
        try:
            yield _decode(payload)
        except (struct.error, ValueError, LookupError, TypeError) as error:
            raise LedgerError(
                f"{path}: the record at byte {offset} is none that this farspan knows ({error!r}); "
                "read it with the version that wrote it"
            ) from error


def _payloads(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and payload of each whole record."""
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            if not MAGIC.startswith(magic):
                raise LedgerError(
                    f"{path}: damaged at byte 0, or no ledger of this version of farspan: it "
                    f"begins with {magic!r}, not with {MAGIC!r}. Restore it from a copy"
                )
            return
        offset = len(MAGIC)
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            length, payload_crc, frame_crc = _FRAME.unpack(frame)
            if zlib.crc32(frame[:_FRAME_CHECKED]) != frame_crc:
                # A machine that fails may leave a file longer than what was written to it.
                if not any(frame) and _is_zero_to_the_end(file):
                    return
                raise _damaged(path, offset)
            payload = file.read(length)
            if len(payload) < length:
                return
            if zlib.crc32(payload) != payload_crc:
                raise _damaged(path, offset)
            yield offset, payload
            offset += _FRAME.size + length


def _is_zero_to_the_end(file: BinaryIO) -> bool:
    return not any(any(part) for part in iter(lambda: file.read(_ZEROS_AT_A_TIME), b""))


def _damaged(path: Path, offset: int) -> LedgerError:
    return LedgerError(
        f"{path}: the record at byte {offset} is damaged: its checksum does not match. Restore the "
        f"file from a copy. If the machine failed while it was the last one being written, "
        f"`truncate -s {offset} {path}` removes it and all that follows"
    )


def _end_of_whole_records(path: Path, attempt: int) -> int:
    """Where the next record goes: 0 in a file without a first line."""
    if not path.exists():
        return 0
    end = len(MAGIC) if path.stat().st_size >= len(MAGIC) else 0
    for offset, payload in _payloads(path):
        end = offset + _FRAME.size + len(payload)
        if payload[0] == _ATTEMPT_BEGUN and (newer := _decode(payload).attempt) > attempt:
            raise LedgerError(
                f"{path}: attempt {newer} has begun there already, and attempt {attempt} may not "
                "write to it any more; start the run again, as a new attempt"
            )
    return end


def _framed(payload: bytes) -> bytes:
    checked = struct.pack("<II", len(payload), zlib.crc32(payload))
    return checked + struct.pack("<I", zlib.crc32(checked)) + payload


def _json_payload(kind: int, record: AttemptBegun | RollbackBegun | RolledBack) -> bytes:
    return bytes([kind]) + json.dumps(asdict(record), separators=(",", ":")).encode()


def _decode(payload: bytes) -> Record:
    kind = payload[0]
    if kind == _ATTEMPT_BEGUN:
        fields = json.loads(payload[1:])
        sources = tuple(LedgerSource(**source) for source in fields.pop("sources"))
        curriculum = tuple((first, weights) for first, weights in fields.pop("curriculum", ()))
        lanes = tuple((first, rows) for first, rows in fields.pop("lanes", ((1, 1),)))
        return AttemptBegun(**fields, sources=sources, curriculum=curriculum, lanes=lanes)
    if kind == _ROLLBACK_BEGUN:
        return RollbackBegun(**json.loads(payload[1:]))
    if kind == _ROLLED_BACK:
        return RolledBack(**json.loads(payload[1:]))
    if kind not in (_TRAINED, _SKIPPED):
        raise ValueError(f"kind {kind}")
    *numbers, reason_bytes = _BATCH.unpack_from(payload)[1:]
    end_of_reason = _BATCH.size + reason_bytes
    values = [*numbers, payload[end_of_reason:]]
    if kind == _TRAINED:
        return Trained(*values)
    values.append(payload[_BATCH.size : end_of_reason].decode())
    return Skipped(*values)


def _join(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """One run [n, 4] for pieces that go on with each other: only the ends of rows part them."""
    before, after = pieces[:-1], pieces[1:]
    goes_on = (before[:, :2] == after[:, :2]).all(axis=1) & (before[:, 3] == after[:, 2])
    is_first, is_last = np.append(True, ~goes_on), np.append(~goes_on, True)
    return np.column_stack([pieces[is_first, :3], pieces[is_last, 3]])


def _split(runs: NDArray[np.int64], rows: int, seq_len: int) -> BatchPlan:
    """The plan in which `runs` fill `rows` rows, one after the other."""
    ends = np.cumsum(runs[:, 3] - runs[:, 2])
    ends_of_rows = seq_len * np.arange(1, rows + 1)
    stops = np.union1d(ends, ends_of_rows)
    starts = np.append(0, stops[:-1])
    run = np.searchsorted(ends, starts, side="right")
    # From places in the batch to places in the document.
    shift = runs[run, 3] - ends[run]
    pieces = np.column_stack([runs[run, :2], starts + shift, stops + shift])
    return BatchPlan(pieces, np.append(0, np.searchsorted(stops, ends_of_rows) + 1))


def _is_cut_by_rows(plan: BatchPlan, runs: NDArray[np.int64], rows: int, seq_len: int) -> bool:
    if (runs[:, 3] - runs[:, 2]).sum() != rows * seq_len:
        return False
    again = _split(runs, rows, seq_len)
    return np.array_equal(again.pieces, plan.pieces) and np.array_equal(
        again.row_starts, plan.row_starts
    )


def _pack(runs: NDArray[np.int64]) -> bytes:
    """Column by column and, within one, all lowest bytes first: what is left are runs of zeros."""
    columns = runs.T.astype("<i8", order="C")
    columns[3] -= columns[2]
    planes = columns.view(np.uint8).reshape(4, -1, 8).transpose(0, 2, 1)
    return zlib.compress(planes.tobytes())


def _unpack(packed: bytes) -> NDArray[np.int64]:
    planes = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(4, 8, -1)
    columns = planes.transpose(0, 2, 1).copy(order="C").view("<i8").reshape(4, -1)
    columns[3] += columns[2]
    return np.ascontiguousarray(columns.T, np.int64)
