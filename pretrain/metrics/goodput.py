"""Where the time since a run began has gone: into steps that stand, or lost, and to what."""

import json
import time
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pretrain.metrics.sinks import last_row
from pretrain.run_dir import RunDirectory, write_atomically

Cause = Literal[
    "starting",
    "data wait",
    "skipped batches",
    "undone steps",
    "evaluation",
    "checkpoints",
    "logging",
    "between attempts",
    "stopped",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)


class Goodput:
    """Accounts for all time since rank 0 of a run's first attempt was started.

    Each moment is productive or lost to one cause: what has passed since the call before is named
    by the next one. Steps are productive once they are learned from, and no longer once they are
    undone: by a rollback, or because an attempt died before the next checkpoint. The account
    stands in each row, and in RUN/time.json for what comes after the last; so an attempt goes on
    with that of the one before, whatever that has died of.

    Args:
        attempt: the one that it accounts for from now on.
        started: when the process of rank 0 was, in seconds since the epoch.
        is_requeued: whether the attempt's job has waited in a queue since the attempt before.
    """

    def __init__(
        self, run: RunDirectory, attempt: int, started: float, *, is_requeued: bool = False
    ) -> None:
        self._run, self._attempt = run, attempt
        if not run.began.exists():
            write_atomically(run.began, json.dumps({"time": started}) + "\n")
        began = json.loads(run.began.read_text())["time"]
        before = max(_in_last_row(run), _in_file(run), key=_elapsed_s)
        self._productive_s: float = before["productive_s"]
        self._lost_s: dict[Cause, float] = {
            cause: before["lost_s"].get(cause, 0.0) for cause in CAUSES
        }
        known_until = began + _elapsed_s(before)
        was_stopped = before.get("is_stopped", False) and not is_requeued
        idle: Cause = "stopped" if was_stopped else "between attempts"
        # The clock may have been set back since.
        self._lost_s[idle] += max(0.0, started - known_until)
        self._lost_s["starting"] += max(0.0, time.time() - max(started, known_until))
        self._seen = time.monotonic()

    def add_step(self, data_wait_s: float, *, is_taken: bool) -> None:
        """What has passed was a step, of which so much was spent waiting for its batch."""
        passed_s = self._pass()
        waited_s = min(passed_s, data_wait_s)
        self._lost_s["data wait"] += waited_s
        if is_taken:
            self._productive_s += passed_s - waited_s
        else:
            self._lost_s["skipped batches"] += passed_s - waited_s

    def spend(self, cause: Cause) -> None:
        """What has passed was spent on this."""
        self._lost_s[cause] += self._pass()

    def undo(self) -> None:
        """The last row is now that of the step that training goes on from."""
        stands_s = min(self._productive_s, _in_last_row(self._run)["productive_s"])
        self._lost_s["undone steps"] += self._productive_s - stands_s
        self._productive_s = stands_s

    def save(self, *, is_stopped: bool = False) -> None:
        """Leave the account for the next attempt.

        Args:
            is_stopped: whether this one ends in order: what follows is nobody's loss, unless its
                job waits in a queue.
        """
        account = {
            "productive_s": self._productive_s,
            "lost_s": self._lost_s,
            "is_stopped": is_stopped,
        }
        self._run.commit(self._attempt, self._run.time_spent, json.dumps(account) + "\n")

    def metrics(self) -> dict[str, Any]:
        elapsed_s = self._productive_s + sum(self._lost_s.values())
        wanted_s = elapsed_s - self._lost_s["stopped"]
        return {
            "perf/productive_s": self._productive_s,
            "perf/lost_s": dict(self._lost_s),
            "perf/goodput": self._productive_s / elapsed_s if elapsed_s else 1.0,
            "perf/ettr": self._productive_s / wanted_s if wanted_s else 1.0,
        }

    def _pass(self) -> float:
        """The seconds since the call before."""
        before, self._seen = self._seen, time.monotonic()
        return self._seen - before


Account = Mapping[str, Any]


def _in_last_row(run: RunDirectory) -> Account:
    last = last_row(run.metrics) if run.metrics.exists() else {}
    return {
        "productive_s": last.get("perf/productive_s", 0.0),
        "lost_s": last.get("perf/lost_s", {}),
    }


def _in_file(run: RunDirectory) -> Account:
    if not run.time_spent.exists():
        return {"productive_s": 0.0, "lost_s": {}}
    account: Account = json.loads(run.time_spent.read_text())
    return account


def _elapsed_s(account: Account) -> float:
    return account["productive_s"] + sum(account["lost_s"].values())
