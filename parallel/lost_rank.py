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
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
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
from parallel.job_status import JobStatus
from parallel.stragglers import Slowest
from parallel.verdict import Answer, first_of, who_has_not_arrived

# A thread answers in milliseconds, unless its process is starved of a core.
ANSWER_S = 6.0
POLL_S = 0.1
# How often the watching thread looks whether the main thread waits.
WATCH_S = 0.05
# What one look can have missed at most; a process that was stopped was not silent meanwhile.
MISSED_S = 1.0
# Thousands of ranks write to the store of rank 0.
HEARTBEAT_S = 10.0
FOREVER = timedelta(days=365)
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
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("lost_rank", store.clone())
        # A call that waits holds on to its connection.
        self._store_of_thread = dist.PrefixStore("lost_rank", store.clone())
        self._is_leaving = False
        self._is_closed = threading.Event()
        self._is_ending = threading.Lock()
        self._is_written_down = threading.Lock()
        self._error: Exception | None = None
        self._failed_in: Activity | None = None
        self._verdict: dict[str, str | int] | None = None
        self._process_of_store = ""
        self._status = JobStatus(self._store, self._heart)
        self._answering = threading.Thread(target=self._answer_calls, daemon=True)
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._reporting = threading.Thread(target=self._report_status, daemon=True)

    def beat(self, step: int, phase: str, *, is_slow: bool = False) -> None:
        """Say that this rank begins `phase` of `step`.

        Args:
            is_slow: whether the phase waits for storage, and may take four times the timeout.
        """
        self._heart.beat(step, phase, is_slow=is_slow)

    @property
    def slowest(self) -> Slowest | None:
        """The rank that waited least for the others lately; see `JobStatus`."""
        return self._status.slowest

    def __enter__(self) -> Self:
        self._store.set(f"process/{self._rank}", f"{socket.gethostname()} {os.getpid()}")
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
            self._store.set(f"call/{self._rank}", "")
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
        store = self._store_of_thread
        with suppress(dist.DistError):
            self._process_of_store = _process_of_store(store)
            store.wait([f"call/{self._rank}"], FOREVER)
            if self._is_closed.is_set():
                return
            answer = self._answer(self._activity())
            store.set(f"answer/{self._rank}", json.dumps(asdict(answer)))
            self._write_down()
            store.wait(["verdict"], timedelta(seconds=2 * ANSWER_S))
            self._verdict = json.loads(store.get("verdict"))
            store.add("told", 1)
            if self._may_end():
                self._stay_while_others_ask()
                self._end(str(self._verdict["text"]))

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
        # A store whose process is stopped never answers, and no timeout applies.
        asking = threading.Thread(target=self._ask, args=(answer, noticed), daemon=True)
        asking.start()
        asking.join(timeout=2 * ANSWER_S)
        if self._verdict:
            self._end(str(self._verdict["text"]))
        self._end(
            f"{self._process_of_store} is dead, stopped or cut off, and the job's store with it; "
            + noticed
        )

    def _ask(self, answer: Answer, noticed: str) -> None:
        """Reach a verdict, or hear that of the rank that was first to ask."""
        with suppress(dist.DistError):
            if self._store.add("noticed", 1) == 1:
                lost, answered = self._call_on_others(answer)
                stacks = f"; stacks: {self.folder / STACKS}" if self.folder else ""
                self._verdict = {"text": f"{lost}; {noticed}{stacks}", "answered": answered}
                self._store.set("verdict", json.dumps(self._verdict))
            else:
                self._answering.join()
            self._stay_while_others_ask()
        if self._verdict is None:
            # The thread may have heard it before the store went.
            self._answering.join(timeout=1)

    def _call_on_others(self, own: Answer) -> tuple[str, int]:
        """Who is lost, in words, and how many ranks answered."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        for rank in others:
            self._store.set(f"call/{rank}", "")
        silent = self._wait_for_answers(set(others))
        answers = {rank: self._answer_of(rank) for rank in others if rank not in silent}
        failed, text = self._failure()
        lost = [f"{self._process(failed)} failed: {text}"] if text else []
        for rank in sorted(silent - {failed}):
            how = "is dead" if self._is_dead(rank) else "does not answer (stopped, or cut off)"
            lost.append(f"{self._process(rank)} {how}")
        late = [] if lost else who_has_not_arrived(self._rank, answers | {self._rank: own})
        lost += [f"{self._process(rank)} {how}" for rank, how in late]
        nobody = "all ranks answer, and none is elsewhere: the network or its backend is stuck"
        return first_of(lost or [nobody]), len(answers)

    def _wait_for_answers(self, silent: set[int]) -> set[int]:
        """Those of `silent` that have not answered in time."""
        deadline = time.monotonic() + ANSWER_S
        while silent and time.monotonic() < deadline:
            time.sleep(POLL_S)
            silent = {rank for rank in silent if not self._has(f"answer/{rank}")}
            if all(rank == self._failure()[0] or self._is_dead(rank) for rank in silent):
                break
        return silent

    def _answer_of(self, rank: int) -> Answer:
        return Answer(**json.loads(self._store.get(f"answer/{rank}")))

    def _write_down(self) -> None:
        """Write down the stacks of all threads, and what the flight recorder holds; once."""
        if not self._is_written_down.acquire(blocking=False):
            return
        # A file system that hangs must not keep the others from the verdict.
        writing = threading.Thread(target=self._write_files, daemon=True)
        writing.start()
        writing.join(timeout=ANSWER_S / 2)

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

    def _stay_while_others_ask(self) -> None:
        """The store lives in rank 0: it leaves once the others know."""
        deadline = time.monotonic() + ANSWER_S
        while self._rank == 0 and self._verdict and time.monotonic() < deadline:
            if self._store.add("told", 0) >= int(self._verdict["answered"]):
                break
            time.sleep(POLL_S)

    def _report(self, error: Exception) -> None:
        """Let the others know why this rank leaves them, if it is the first to."""
        report = json.dumps([self._rank, f"{type(error).__name__}: {error}".splitlines()[0]])
        with suppress(dist.DistError):
            self._store.compare_set("failure", "", report)

    def _failure(self) -> tuple[int, str]:
        """The rank that reported an error of its own, and the error; or -1 and nothing."""
        if not self._has("failure"):
            return -1, ""
        rank, text = json.loads(self._store.get("failure"))
        return rank, text

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _process(self, rank: int) -> str:
        if not self._has(f"process/{rank}"):
            return f"rank {rank}"
        return _named(rank, self._store.get(f"process/{rank}"))

    def _is_dead(self, rank: int) -> bool:
        """Whether that is certain: it was a process of this machine."""
        if not self._has(f"process/{rank}"):
            return False
        host, pid = self._store.get(f"process/{rank}").decode().split()
        if host != socket.gethostname():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def _wait_for_the_end() -> None:
    """Another thread is about to end this process."""
    time.sleep(4 * ANSWER_S)


def _process_of_store(store: dist.Store) -> str:
    """What to call the process that the store lives in; waits until it has introduced itself."""
    first = _named(0, store.get("process/0"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return f"torchrun's agent on {os.environ['MASTER_ADDR']}"
    return first


def _named(rank: int, process: bytes) -> str:
    host, pid = process.decode().split()
    return f"rank {rank} (process {pid} on {host})"


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
