"""Find out which ranks are lost when a collective fails.

A collective that fails tells nothing of who is to blame: on gloo a neighbour's connection has
closed or timed out. So every rank keeps an idle thread that waits on the job's store. The first
rank whose collective fails calls on all the others: their threads answer what their rank is doing,
even where it is stuck; who does not answer is dead, stopped or cut off.

On NCCL a collective that fails raises nothing in Python. torch's watchdog, which is on unless
TORCH_NCCL_ASYNC_ERROR_HANDLING says otherwise, aborts the process once the timeout of the group is
over, and names the collective and the group in the rank's log; who is lost it does not say.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from parallel.call_stack import Activity, activity_at_error, current_activity

# A thread answers in milliseconds, unless its process is starved of a core.
ANSWER_S = 6.0
POLL_S = 0.1
FOREVER = timedelta(days=365)
NAMED_AT_MOST = 8


class LostRankError(RuntimeError):
    """Other ranks are dead, or do not take part in a collective; the message says which.

    The process has to end by `os._exit`: the threads of its groups may never.
    """


class RankMonitor:
    """While training runs inside it, a failed collective becomes a LostRankError.

    One idle thread and two connections to the store; nothing on the way of a step.

    Attributes:
        step: what this rank is working on, for the error.
    """

    def __init__(self) -> None:
        self.step = 0
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("lost_rank", store.clone())
        # A call that waits holds on to its connection.
        self._store_of_thread = dist.PrefixStore("lost_rank", store.clone())
        self._is_leaving = False
        self._is_closed = False
        self._failed_in: Activity | None = None
        self._verdict: dict[str, str | int] | None = None
        self._process_of_store = ""
        self._thread = threading.Thread(target=self._answer_calls, daemon=True)

    def __enter__(self) -> Self:
        self._store.set(f"process/{self._rank}", f"{socket.gethostname()} {os.getpid()}")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._is_leaving = True
        if isinstance(error, Exception):
            self._failed_in = activity_at_error(error)
            if _is_lost_connection(error):
                raise LostRankError(self._explain(error, self._failed_in)) from error
            self._report(error)
        self._is_closed = True
        with suppress(dist.DistError):
            self._store.set(f"call/{self._rank}", "")
        self._thread.join(timeout=1)

    def _answer_calls(self) -> None:
        store = self._store_of_thread
        with suppress(dist.DistError):
            self._process_of_store = _named(0, store.get("process/0"))
            store.wait([f"call/{self._rank}"], FOREVER)
            if self._is_closed:
                return
            answer = asdict(self._activity()) | {"step": self.step}
            store.set(f"answer/{self._rank}", json.dumps(answer))
            store.wait(["verdict"], timedelta(seconds=2 * ANSWER_S))
            self._verdict = json.loads(store.get("verdict"))
            store.add("told", 1)

    def _activity(self) -> Activity:
        """What this rank is doing, or did when a collective of its own failed."""
        activity = current_activity()
        while self._is_leaving and not self._is_closed and self._failed_in is None:
            time.sleep(POLL_S)
        return self._failed_in or activity

    def _explain(self, error: Exception, activity: Activity) -> str:
        place = f"in {activity.what} at step {self.step}"
        noticed = f"noticed by rank {self._rank} {place}: {_reason(error)}"
        # A store whose process is stopped never answers, and no timeout applies.
        asking = threading.Thread(target=self._ask, args=(activity, noticed), daemon=True)
        asking.start()
        asking.join(timeout=2 * ANSWER_S)
        if self._verdict:
            return str(self._verdict["text"])
        return (
            f"{self._process_of_store} is dead, stopped or cut off, and the job's store with it; "
            + noticed
        )

    def _ask(self, activity: Activity, noticed: str) -> None:
        """Reach a verdict, or hear that of the rank that was first to ask."""
        with suppress(dist.DistError):
            if self._store.add("noticed", 1) == 1:
                lost, answered = self._call_on_others(activity)
                self._verdict = {"text": f"{lost}; {noticed}", "answered": answered}
                self._store.set("verdict", json.dumps(self._verdict))
            else:
                self._thread.join()
            self._stay_while_others_ask()
        # The thread may have heard the verdict before the store went.
        self._thread.join(timeout=1)

    def _call_on_others(self, activity: Activity) -> tuple[str, int]:
        """Who is lost, in words, and how many ranks answered."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        for rank in others:
            self._store.set(f"call/{rank}", "")
        silent = self._wait_for_answers(set(others))
        answered = [rank for rank in others if rank not in silent]
        failed, text = self._failure()
        lost = [f"{self._process(failed)} failed: {text}"] if text else []
        for rank in sorted(silent - {failed}):
            how = "is dead" if self._is_dead(rank) else "does not answer (stopped, or cut off)"
            lost.append(f"{self._process(rank)} {how}")
        lost = lost or self._elsewhere(answered, activity)
        named = "; ".join(lost[:NAMED_AT_MOST])
        if len(lost) > NAMED_AT_MOST:
            named += f"; and {len(lost) - NAMED_AT_MOST} more"
        return named, len(answered)

    def _wait_for_answers(self, silent: set[int]) -> set[int]:
        """Those of `silent` that have not answered in time."""
        deadline = time.monotonic() + ANSWER_S
        while silent and time.monotonic() < deadline:
            time.sleep(POLL_S)
            silent = {rank for rank in silent if not self._has(f"answer/{rank}")}
            if all(rank == self._failure()[0] or self._is_dead(rank) for rank in silent):
                break
        return silent

    def _elsewhere(self, answered: Iterable[int], activity: Activity) -> list[str]:
        """All are alive: who is in no collective, or else who waits for whom in another one."""
        answers = {rank: json.loads(self._store.get(f"answer/{rank}")) for rank in answered}
        strays = [rank for rank, answer in answers.items() if not answer["ranks"]]
        if not strays:
            answers[self._rank] = asdict(activity)
            strays = _chain(self._rank, answers)
        return [
            f"{self._process(rank)} has not arrived: it is in {answers[rank]['what']} "
            f"at step {answers[rank]['step']}"
            for rank in strays
        ] or ["all ranks answer, and none is elsewhere"]

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


def _chain(first: int, answers: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that `first` waits for, then those that they wait for, and so on."""
    chain = [first]
    for waiting in chain:
        chain += [
            rank
            for rank in answers[waiting]["ranks"]
            if rank not in chain and answers[rank]["what"] != answers[waiting]["what"]
        ]
    return chain[1:]


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
