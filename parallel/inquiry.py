"""Ask all ranks of a job what they are doing, through its store, and say who is lost.

The store is one thread of rank 0 and there may be thousands of ranks, so that the number of
requests of the one that asks does not grow with them. What has an end is silence, not the asking:
a store that still answers is not dead, however long it takes.

What lies in the store, each but for the last two written once:

    process/N   host and process id of rank N
    asker       the first rank that noticed something
    call/N      rank N is asked
    answer/N    what it is doing; empty until it has answered
    failure     the first rank that failed by itself, and its error
    verdict     who is lost, in words, and how many have answered
    answers     so many have answered
    told        so many of them have read the verdict
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from parallel.verdict import VERDICT_S, Answer, first_of, who_has_not_arrived

POLL_S = 0.1
# A thread answers in milliseconds, unless its process is starved of a core. Counted in polls, each
# of which shows that the process that waits is not starved itself.
ANSWER_POLLS = 200
# Answers that go on arriving may take twice as long.
ALL_ANSWERS_POLLS = 2 * ANSWER_POLLS
# Between two looks whether those that have not answered are dead, which needs all answers.
LOOK_POLLS = 10
# All ranks look for the verdict. A `wait` that ends without one would warn in every log.
VERDICT_POLL_S = 1.0
VERDICT_POLLS = int(VERDICT_S / VERDICT_POLL_S)
FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Verdict:
    """Who is lost, in words, and how many ranks have answered."""

    text: str
    answered: int


class Inquiry:
    """One rank's part in it, on a connection of its own.

    All methods raise torch.distributed.DistError once the store is gone.

    Attributes:
        heard: how often the store has answered.
    """

    def __init__(self, store: Any, rank: int, size: int, poll_s: float = POLL_S) -> None:
        self.heard = 0
        self._store = store
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._poll_s = poll_s

    def introduce(self) -> None:
        """Say which process this rank is."""
        self._store.set(f"process/{self._rank}", f"{socket.gethostname()} {os.getpid()}")

    def process_of_store(self) -> str:
        """What to call that in which the store lives; waits until it has introduced itself."""
        first = _named(0, self._store.get("process/0"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
            return f"torchrun's agent on {os.environ['MASTER_ADDR']}"
        return first

    def wait_for_call(self) -> None:
        """Until somebody asks, or `call_off`."""
        self._store.wait([f"call/{self._rank}"], FOREVER)

    def call_off(self) -> None:
        """Let this rank's `wait_for_call` return."""
        self._store.set(f"call/{self._rank}", "")

    def answer(self, answer: Answer) -> None:
        self._store.set(f"answer/{self._rank}", answer.to_json())
        self._store.add("answers", 1)

    def report_failure(self, error: str) -> None:
        """Let the others know why this rank leaves them, if it is the first to."""
        self._store.compare_set("failure", "", json.dumps([self._rank, error]))

    def asker(self) -> int:
        """The rank that asks: the first that has called this."""
        asker = int(self._store.compare_set("asker", "", str(self._rank)))
        self.heard += 1
        return asker

    def ask(self, own: Answer, noticed: str) -> Verdict:
        """Call on all others, and let them know who is lost.

        Args:
            own: what this rank is doing.
            noticed: what to add to the verdict.
        """
        # Answers are there before one is called, so that all can be read at once.
        for kind in ("answer", "call"):
            keys = [f"{kind}/{rank}" for rank in self._others]
            self._store.multi_set(keys, [""] * len(keys))
        answers = self._wait_for_answers()
        text = f"{self._who_is_lost(answers, own)}; {noticed}"
        self._store.set("verdict", json.dumps([text, len(answers)]))
        return Verdict(text, len(answers))

    def wait_for_verdict(self) -> Verdict | None:
        """What the asker has found out; None if it has not for long enough."""
        for _ in range(VERDICT_POLLS):
            is_there = self._store.check(["verdict"])
            self.heard += 1
            if is_there:
                return Verdict(*json.loads(self._store.get("verdict")))
            time.sleep(VERDICT_POLL_S)
        return None

    def note_told(self) -> None:
        """This rank, which has answered, has read the verdict."""
        self._store.add("told", 1)

    def stay_until_told(self, verdict: Verdict) -> None:
        """The store ends with the process that it lives in, which leaves when the others know."""
        told, quiet = 0, 0
        while told < verdict.answered and quiet < ANSWER_POLLS:
            now = self._store.add("told", 0)
            quiet = 0 if now > told else quiet + 1
            told = now
            self.heard += 1
            time.sleep(self._poll_s)

    def _wait_for_answers(self) -> dict[int, Answer]:
        """Those that come before all who still might answer are silent for too long."""
        answered, quiet = 0, 0
        for _ in range(ALL_ANSWERS_POLLS):
            time.sleep(self._poll_s)
            now = self._store.add("answers", 0)
            quiet = 0 if now > answered else quiet + 1
            answered = now
            self.heard += 1
            if answered == len(self._others) or quiet == ANSWER_POLLS:
                break
            if quiet % LOOK_POLLS == 1 and not self._may_answer():
                break
        return self._answers()

    def _answers(self) -> dict[int, Answer]:
        texts = self._store.multi_get([f"answer/{rank}" for rank in self._others])
        self.heard += 1
        pairs = zip(self._others, texts, strict=True)
        return {rank: Answer.from_json(text) for rank, text in pairs if text}

    def _may_answer(self) -> bool:
        """Whether there are ranks left that have not, and neither failed nor are dead."""
        failed, _ = self._failure()
        silent = self._silent(self._answers(), failed)
        return len(self._dead(self._processes(silent))) < len(silent)

    def _silent(self, answers: Iterable[int], failed: int) -> list[int]:
        return sorted({*self._others} - {*answers, failed})

    def _who_is_lost(self, answers: dict[int, Answer], own: Answer) -> str:
        failed, error = self._failure()
        silent = self._silent(answers, failed)
        late = []
        if not silent and not error:
            late = who_has_not_arrived(self._rank, answers | {self._rank: own})
        reported = [failed] if error else []
        processes = self._processes([*reported, *silent, *(rank for rank, _ in late)])
        dead = self._dead(processes)
        lost = [f"{_named(failed, processes.get(failed))} failed: {error}"] if error else []
        for rank in silent:
            how = "is dead" if rank in dead else "does not answer (stopped, or cut off)"
            lost.append(f"{_named(rank, processes.get(rank))} {how}")
        lost += [f"{_named(rank, processes.get(rank))} {how}" for rank, how in late]
        nobody = "all ranks answer, and none is elsewhere: the network or its backend is stuck"
        return first_of(lost or [nobody])

    def _failure(self) -> tuple[int, str]:
        """The rank that reported an error of its own, and the error; or -1 and nothing."""
        if not self._store.check(["failure"]):
            return -1, ""
        rank, error = json.loads(self._store.get("failure"))
        return rank, error

    def _processes(self, ranks: Iterable[int]) -> dict[int, bytes]:
        """Of those of `ranks` that have introduced themselves."""
        there = self._there([f"process/{rank}" for rank in ranks])
        return {int(key.partition("/")[2]): value for key, value in there.items()}

    def _there(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Those of `keys` that are in the store, which only tells whether all of some are."""
        if not keys:
            return {}
        self.heard += 1
        if self._store.check(list(keys)):
            return dict(zip(keys, self._store.multi_get(list(keys)), strict=True))
        if len(keys) == 1:
            return {}
        half = len(keys) // 2
        return self._there(keys[:half]) | self._there(keys[half:])

    def _dead(self, processes: dict[int, bytes]) -> set[int]:
        """Those of which that is certain: they were processes of this machine."""
        here = socket.gethostname()
        return {
            rank
            for rank, process in processes.items()
            if process.decode().split()[0] == here and _is_gone(int(process.decode().split()[1]))
        }


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _named(rank: int, process: bytes | None) -> str:
    if process is None:
        return f"rank {rank}"
    host, pid = process.decode().split()
    return f"rank {rank} (process {pid} on {host})"
