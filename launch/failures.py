"""What the attempts of a run died of, and whether another one is worth it.

One rule for the launcher on one machine (launch.agent) and for batch jobs (slurm/train.sbatch): a
run that was asked to stop goes on, and so does one that has failed, unless it would fail again.
That is so for a mistake, for what training itself gave up on, after too many starts in a row that
came no further than those before, and when three attempts in a row died of the same error at the
same step.
"""

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from launch.cancelled import read_cancelled
from launch.causes import Cause, Kind, has_logs
from launch.slurm.start import start_of
from pretrain.config import read_run_config
from pretrain.errors import AttemptError, UserError
from pretrain.metrics.sinks import last_step
from pretrain.run_dir import RunDirectory, write_atomically

CRASH_LOOP = 3
# A node that fails, or another one in its place, says nothing of the run.
NOT_THE_RUNS: Sequence[Kind] = ("node",)
HINTS: dict[Kind, str] = {
    "memory": "`farspan train RECIPE --explain-memory` says what takes it, and docs/memory.md what "
    "takes less",
    "killed": "`dmesg` on its node says whether the kernel has ended what took too much memory",
    "hang": "docs/hangs.md says how to read it; the stacks of all ranks are in the folder `stacks` "
    "of the attempt",
    "lost rank": "`dmesg` on its node says whether the kernel has ended it, or a device has failed",
    "error": "the log of that rank has the traceback",
}
NOT_BEGUN = "no rank has begun: what starts them, such as a container, says why in the job's log"


@dataclass(frozen=True)
class Failure:
    """RUN/attempts/NNNN/failure.json.

    Attributes:
        chain: what the starts have in common that are judged together, such as a batch job.
        time: when it was noted, in UTC.
        step: the last step that was logged or saved by then, 0 before the first.
        kind, rank, node, error: of its `Cause`.
    """

    attempt: int
    chain: str
    time: str
    step: int
    kind: Kind
    rank: int | None
    node: str
    error: str

    @property
    def who(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}"
        # What the ranks agree on begins with who it was.
        if self.error.startswith(f"{rank} "):
            rank = ""
        where = f"on {self.node}" if self.node else ""
        return " ".join(filter(None, (rank, where)))

    def __str__(self) -> str:
        return f"{self.who}: {self.error}" if self.who else self.error

    def is_like(self, other: "Failure") -> bool:
        """Whether both died of the same error at the same step."""
        return (self.step, self.kind, self._signature) == (other.step, other.kind, other._signature)

    @property
    def _signature(self) -> str:
        """The error without numbers, addresses and hosts."""
        host = rf"\b{re.escape(self.node)}\b|" if self.node else ""
        return re.sub(rf"{host}0x[0-9a-fA-F]+|\d+(?:\.\d+)?", "#", self.error)


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        goes_on: whether to start another attempt.
        text: why, for the log.
        starts_left: without progress, after the next one.
    """

    goes_on: bool
    text: str
    starts_left: int = 0


def note_failure(run: RunDirectory, attempt: int | None, chain: str, cause: Cause) -> Failure:
    """Write down what an attempt died of.

    Args:
        attempt: None where a start failed before there was one; its failure gets a folder all the
            same, or it would not be counted.
    """
    attempt = attempt or run.new_attempt()
    time = datetime.now(UTC).isoformat(timespec="seconds")
    failure = Failure(attempt, chain, time, furthest_step(run), **asdict(cause))
    write_atomically(run.failure_of(attempt), json.dumps(asdict(failure), indent=1) + "\n")
    return failure


def read_failure(run: RunDirectory, attempt: int) -> Failure | None:
    """What an attempt died of, if it has failed and that could be written down."""
    # A file that cannot be read is as good as none.
    with suppress(OSError, ValueError, TypeError):
        return Failure(**json.loads(run.failure_of(attempt).read_text()))
    return None


def last_failures(run: RunDirectory, chain: str, job: str | None = None) -> list[Failure]:
    """Of the newest attempts of a chain, back to one that did not fail; oldest first.

    Args:
        job: as which older versions noted the chain.
    """
    failures: list[Failure] = []
    for attempt in reversed(run.all_attempts()):
        failure = read_failure(run, attempt)
        if failure is None or failure.chain not in (chain, job):
            break
        failures.append(failure)
    return failures[::-1]


def judge(run: RunDirectory, chain: str, at_most: int, job: str | None = None) -> Verdict:
    """Whether to start another attempt, when the newest one has ended and its failure is noted.

    Args:
        chain: as in the `Failure`; another chain begins to count anew.
        at_most: starts in a row after failures without progress.
        job: its number, by which it may have been cancelled; None: the chain.
    """
    if run.done.exists():
        return Verdict(False, "done")
    cancelled = read_cancelled(run)
    if cancelled and cancelled.holds_for([job or chain]):
        return Verdict(False, f"cancelled by {cancelled.by}; `{_resubmit(run)}` goes on from here")
    failures = last_failures(run, chain, job)
    if not failures:
        return Verdict(True, "it was asked to stop, and everything is saved", at_most)
    last = failures[-1]
    if last.kind in ("mistake", "final"):
        return Verdict(False, f"not started again, it would end alike: {last}")
    if _is_crash_loop(failures):
        return Verdict(False, _diagnosis(run, failures))
    count = _without_progress(failures)
    if count > at_most:
        return Verdict(False, _gave_up(run, failures, at_most))
    text = f"it has failed after step {last.step}, {count} of {at_most} times without progress"
    return Verdict(True, text, at_most - count)


def furthest_step(run: RunDirectory) -> int:
    """The last step that is logged or saved, 0 before the first."""
    # Half a second that the ranks need not wait for.
    from pretrain.checkpoint.store import saved_steps
    from pretrain.checkpoint.trained import checkpoints_of

    steps = [0]
    # What cannot be read now is no reason to give the run up.
    with suppress(OSError, UserError, AttemptError):
        steps += saved_steps(checkpoints_of(read_run_config(run), run))
    with suppress(OSError, UserError):
        steps.append(last_step(run.metrics))
    return max(steps)


def _is_crash_loop(failures: Sequence[Failure]) -> bool:
    last = failures[-CRASH_LOOP:]
    is_the_runs = last[-1].kind not in NOT_THE_RUNS
    return len(last) == CRASH_LOOP and is_the_runs and all(map(last[-1].is_like, last))


def _without_progress(failures: Sequence[Failure]) -> int:
    """Failures since, and with, the last one before which the run got further than ever."""
    furthest, count = -1, 0
    for failure in failures:
        count = 1 if failure.step > furthest else count + 1
        furthest = max(furthest, failure.step)
    return count


def _diagnosis(run: RunDirectory, failures: Sequence[Failure]) -> str:
    last = failures[-1]
    *others, newest = (failure.attempt for failure in failures[-CRASH_LOOP:])
    when = f"after step {last.step}" if last.step else "before the first step was logged"
    hint = NOT_BEGUN if _log_of_job(run, last) else HINTS[last.kind]
    return (
        f"gave up: attempts {', '.join(map(str, others))} and {newest} died of the same error "
        f"{when}, and another one would too\n  {last}\n  {hint}\n{_how_on(run, last)}"
    )


def _gave_up(run: RunDirectory, failures: Sequence[Failure], at_most: int) -> str:
    last, furthest = failures[-1], max(failure.step for failure in failures)
    if not at_most:
        return f"not started again, as no restarts are allowed: {last}"
    return (
        f"gave up: {at_most} restarts did not get beyond step {furthest}; the last one died of\n"
        f"  {last}\n{_how_on(run, last)}"
    )


def _how_on(run: RunDirectory, last: Failure) -> str:
    log = _log_of_job(run, last)
    where = f"The job's log: {log}" if log else f"The logs: {run.folder_of(last.attempt)}"
    return (
        f"{where}. Once the cause is mended, `{_resubmit(run)}` goes on from the newest checkpoint"
    )


def _log_of_job(run: RunDirectory, failure: Failure) -> Path | None:
    """What a job has said of an attempt in which no rank began; None: ranks have logs."""
    if has_logs(run.folder_of(failure.attempt)):
        return None
    start = start_of(run, failure.attempt)
    return start.log if start else None


def _resubmit(run: RunDirectory) -> str:
    return f"farspan launch resubmit {shlex.quote(str(run.root))}"
