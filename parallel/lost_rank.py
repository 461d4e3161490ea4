"""Find out which ranks are lost: when a collective fails, and when nothing moves any more.

A collective that fails tells nothing of who is to blame: on gloo a neighbour's connection has
closed or timed out. One that hangs tells nothing at all; on NCCL none ever raises in Python. So
every rank says in which phase of which step it is, and idle threads watch over it:

- One waits on the job's store, to answer what its rank is doing even where that is stuck.
- One notices when its rank has been silent for too long, and does nothing that may block.
- One leaves a heartbeat in the store every few seconds; that of rank 0 writes them into one file.

The first rank whose collective fails, or that has been silent for too long, calls on all the
others. Who does not answer is dead, stopped or cut off; else whoever is not in a collective, or in
another one, keeps the rest waiting. All ranks that are called write down the stacks of their
threads and what torch's flight recorder holds; then they end, all with the same message.

Not covered: native code that never lets go of the interpreter stops these threads of its rank too.
The other ranks name it as one that does not answer, and its stacks are in its log (`faulthandler`
needs no interpreter); where that happens on all ranks at once, or on the only one, nothing ends
the job, but its heartbeats are old.
"""

import faulthandler
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TextIO

import torch
import torch.distributed as dist

from parallel.call_stack import (
    Activity,
    activity_at_error,
    current_activity,
    waits_in_collective,
)
from parallel.flight_recorder import write_dump
from parallel.heartbeat import Heartbeat
from parallel.inquiry import Inquiry, Verdict
from parallel.job_status import JobStatus
from parallel.stragglers import Slowest
from parallel.verdict import VERDICT_S, Answer

POLL_S = 0.1
# Silence of the job's store, in polls of a process that itself runs.
STORE_POLLS = 200
# A file system that hangs must not keep the others from the verdict.
WRITE_S = 3.0
# How often the watching thread looks whether the main thread waits.
WATCH_S = 0.05
# What one look can have missed at most; a process that was stopped was not silent meanwhile.
MISSED_S = 1.0
# Thousands of ranks write to the store of rank 0.
HEARTBEAT_S = 10.0
STACKS = "stacks"
FLIGHT_RECORDER = "flight_recorder"


class RankMonitor:
    """While training runs inside it, a collective that fails or hangs ends the process with the
    rank to blame. Collective.

    Nothing on the way of a step but `beat`, which sets variables; two connections to the store.

    Attributes:
        folder: where `heartbeats.json`, `stacks/rank-N.txt` and `flight_recorder/rank_N` go, once
            there is one.
    """

    def __init__(
        self,
        end: Callable[[str], NoReturn],
        hang_timeout_s: float,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """
        Args:
            end: ends the process, by `os._exit`: the threads of its groups may never. It is given
                what to tell, and called by any thread, once.
            hang_timeout_s: how long a phase of a step may take; see `Heartbeat`.
            heartbeat_s: between two heartbeats in the store.
        """
        self.folder: Path | None = None
        self._end = end
        self._hang_timeout_s = hang_timeout_s
        self._heartbeat_s = heartbeat_s
        self._heart = Heartbeat(hang_timeout_s)
        self._is_on_gpu = torch.cuda.is_available()
        self._rank = dist.get_rank()
        store: Any = dist.distributed_c10d._get_default_store()
        # A call that waits holds on to its connection.
        shared, own = (dist.PrefixStore("lost_rank", store.clone()) for _ in range(2))
        self._inquiry = Inquiry(shared, self._rank, dist.get_world_size())
        self._inquiry_of_thread = Inquiry(own, self._rank, dist.get_world_size())
        self._is_leaving = False
        self._is_closed = threading.Event()
        self._is_ending = threading.Lock()
        self._is_written_down = threading.Lock()
        self._error: Exception | None = None
        self._failed_in: Activity | None = None
        self._verdict: Verdict | None = None
        # The rank that has asked and never told, if the store is there to say so.
        self._asker: int | None = None
        self._process_of_store = ""
        self._status = JobStatus(shared, self._heart)
        self._answering = threading.Thread(target=self._answer_calls, daemon=True)
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._reporting = threading.Thread(target=self._report_status, daemon=True)

    def beat(self, step: int, phase: str, *, is_slow: bool = False) -> None:
        """Say that this rank begins `phase` of `step`.

        Args:
            is_slow: whether the phase waits for storage, and may take four times the timeout.
        """
        self._heart.beat(step, phase, is_slow=is_slow)

    def forget(self) -> None:
        """What phases have taken so far tells nothing of those to come: steps of another size."""
        self._heart.forget()

    @property
    def slowest(self) -> Slowest | None:
        """The rank that waited least for the others lately; see `JobStatus`."""
        return self._status.slowest

    def __enter__(self) -> Self:
        self._inquiry.introduce()
        self._status.report(self.folder)
        self._dump_if_interpreter_is_blocked()
        for thread in (self._answering, self._watching, self._reporting):
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._is_leaving = True
        if isinstance(error, Exception):
            self._error, self._failed_in = error, activity_at_error(error)
            if _is_lost_connection(error):
                self._blame(self._failed_in, _reason(error))
            self._report(error)
        if not self._may_end():
            _wait_for_the_end()
        self._is_closed.set()
        faulthandler.cancel_dump_traceback_later()
        with suppress(dist.DistError):
            self._inquiry.call_off()
        self._answering.join(timeout=1)

    def _may_end(self) -> bool:
        """Whether the calling thread, and no other, is to end the process."""
        return self._is_ending.acquire(blocking=False)

    def _watch(self) -> None:
        """Notice when the main thread is silent for too long."""
        seen = armed = time.monotonic()
        while not self._is_closed.wait(WATCH_S):
            now = time.monotonic()
            passed, seen = now - seen, now
            if not self._is_on_gpu and waits_in_collective():
                self._heart.waited_s += passed
            if now - armed > self._hang_timeout_s / 8:
                armed = now
                self._dump_if_interpreter_is_blocked()
            self._heart.pass_time(min(passed, MISSED_S))
            if self._heart.is_overdue():
                allowed_s = self._heart.allowed_s()
                reason = f"nothing has moved for {allowed_s:.0f} s (train.hang_timeout_s)"
                self._blame(current_activity(), reason)

    def _dump_if_interpreter_is_blocked(self) -> None:
        """Have all stacks written to the log, unless this is called again in time."""
        faulthandler.dump_traceback_later(self._hang_timeout_s)

    def _answer_calls(self) -> None:
        with suppress(dist.DistError):
            self._process_of_store = self._inquiry_of_thread.process_of_store()
            self._inquiry_of_thread.wait_for_call()
            if self._is_closed.is_set():
                return
            self._inquiry_of_thread.answer(self._answer(self._activity()))
            self._write_down()
            verdict = self._inquiry_of_thread.wait_for_verdict()
            if verdict is None:
                return
            self._verdict = verdict
            self._inquiry_of_thread.note_told()
            if self._may_end():
                self._stay_while_others_ask(self._inquiry_of_thread)
                self._end(verdict.text)

    def _activity(self) -> Activity:
        """What this rank is doing, or did when a collective of its own failed."""
        activity = current_activity()
        while self._is_leaving and not self._is_closed.is_set() and self._failed_in is None:
            time.sleep(POLL_S)
        return self._failed_in or activity

    def _answer(self, activity: Activity) -> Answer:
        beat, silent_s = self._heart.last, self._heart.silent_s
        return Answer(activity.what, activity.ranks, beat.step, beat.phase, silent_s)

    def _blame(self, activity: Activity, reason: str) -> None:
        """End this process with the ranks that are to blame for what went wrong in `activity`."""
        if not self._may_end():
            _wait_for_the_end()
            return
        faulthandler.cancel_dump_traceback_later()
        answer = self._answer(activity)
        noticed = f"noticed by rank {self._rank} in {activity.what} {answer.when()}: {reason}"
        self._write_down()
        asking = threading.Thread(target=self._ask, args=(answer, noticed), daemon=True)
        asking.start()
        self._wait_while_store_answers(asking)
        if self._verdict:
            self._end(self._verdict.text)
        who = f"{self._process_of_store} is dead, stopped or cut off, and the job's store with it"
        if self._asker is not None and not asking.is_alive():
            who = f"rank {self._asker} has asked all ranks, and not said who is lost"
        self._end(f"{who}; {noticed}")

    def _wait_while_store_answers(self, asking: threading.Thread) -> None:
        """Until `asking` ends, or hears nothing any more.

        A store whose process is stopped never answers, and no timeout applies.
        """
        heard, quiet = -1, 0
        while asking.is_alive() and quiet < STORE_POLLS:
            now = self._inquiry.heard + self._inquiry_of_thread.heard
            quiet = 0 if now != heard else quiet + 1
            heard = now
            asking.join(timeout=POLL_S)

    def _ask(self, answer: Answer, noticed: str) -> None:
        """Reach a verdict, or hear that of the rank that was first to ask."""
        is_asker = False
        with suppress(dist.DistError):
            is_asker = self._inquiry.asker() == self._rank
            if is_asker:
                stacks = f"; stacks: {self.folder / STACKS}" if self.folder else ""
                self._verdict = self._inquiry.ask(answer, noticed + stacks)
            elif verdict := self._inquiry.wait_for_verdict():
                self._verdict = verdict
            else:
                self._asker = self._inquiry.asker()
            self._stay_while_others_ask(self._inquiry)
        if not is_asker:
            # That has to say that it has heard the verdict, or has heard it before the store went.
            self._answering.join(timeout=1)

    def _write_down(self) -> None:
        """Write down the stacks of all threads, and what the flight recorder holds; once."""
        if not self._is_written_down.acquire(blocking=False):
            return
        writing = threading.Thread(target=self._write_files, daemon=True)
        writing.start()
        writing.join(timeout=WRITE_S)

    def _write_files(self) -> None:
        if self.folder is None:
            self._write_stacks(sys.stderr)
            return
        with suppress(OSError, RuntimeError):
            stacks = self.folder / STACKS
            stacks.mkdir(exist_ok=True)
            with (stacks / f"rank-{self._rank}.txt").open("w") as file:
                self._write_stacks(file)
            recorders = self.folder / FLIGHT_RECORDER
            recorders.mkdir(exist_ok=True)
            write_dump(recorders / f"rank_{self._rank}")

    def _write_stacks(self, file: TextIO) -> None:
        beat = self._heart.last
        file.write(
            f"rank {self._rank} at step {beat.step} ({beat.phase}), stacks of all threads:\n"
        )
        if self._error:
            traceback.print_exception(self._error, file=file)
        file.flush()
        faulthandler.dump_traceback(file)

    def _report_status(self) -> None:
        with suppress(dist.DistError):
            while not self._is_closed.wait(self._heartbeat_s):
                self._status.report(self.folder)

    def _stay_while_others_ask(self, inquiry: Inquiry) -> None:
        """The store lives in rank 0: it leaves once the others know."""
        if self._rank == 0 and self._verdict:
            inquiry.stay_until_told(self._verdict)

    def _report(self, error: Exception) -> None:
        """Let the others know why this rank leaves them."""
        with suppress(dist.DistError):
            self._inquiry.report_failure(f"{type(error).__name__}: {error}".splitlines()[0])


def _wait_for_the_end() -> None:
    """Another thread is about to end this process."""
    time.sleep(2 * VERDICT_S)


def _reason(error: Exception) -> str:
    """What the backend says, without its source file and its advice."""
    line = str(error.__cause__ or error).partition("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". This is ")[0]


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because of another rank, as far as its message tells."""
    if not activity_at_error(error).ranks:
        return False
    return isinstance(error, dist.DistError) or bool(
        re.search(
            r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|connectFullMesh",
            str(error).partition("\n")[0],
        )
    )
