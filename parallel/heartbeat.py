"""How far a rank is, how long it has been silent, and how much of its time it has waited."""

import time
from dataclasses import dataclass

# In the folder of an attempt: where all its ranks are (parallel.job_status).
HEARTBEATS = "heartbeats.json"
# A phase that has never ended may compile; a slow one waits for storage. Nothing may take longer.
PATIENCE_AT_MOST = 4
# A phase that has taken long before may do so again.
PATIENCE_LATER = 2


def longest_silence_s(timeout_s: float) -> float:
    """How long a rank may be silent at most, in any phase."""
    return PATIENCE_AT_MOST * timeout_s


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        step: what the rank is working on.
        phase: of the step.
        is_slow: whether the phase may always take as long as when it happens first.
        at: seconds since the epoch.
    """

    step: int
    phase: str
    is_slow: bool
    at: float


@dataclass(frozen=True)
class Work:
    """What a rank has done when a step began.

    Attributes:
        steps: finished since the first beat.
        busy_s: time since then that it did not wait in collectives.
    """

    steps: int
    busy_s: float


class Heartbeat:
    """Beats of the main thread, and what a thread that watches them makes of their absence.

    A step that is slow is not taken for one that hangs: a phase may take twice as long as it has
    ever taken, but at least `timeout_s` and at most four times that; and four times that when it
    happens for the first time or is slow by nature.

    Attributes:
        last: the newest beat.
        silent_s: time since that beat, as far as this process was running: neither stopped, nor
            on a machine that slept.
        waited_s: time that the rank has waited in collectives; kept by whoever measures it.
        work: None before the first step.
    """

    def __init__(self, timeout_s: float) -> None:
        self.last = Beat(0, "start", True, time.time())
        self.silent_s = 0.0
        self.waited_s = 0.0
        self.work: Work | None = None
        self._timeout_s = timeout_s
        self._watched = self.last
        self._finished: set[str] = set()
        self._longest_s: dict[str, float] = {}
        self._began = 0.0

    def beat(self, step: int, phase: str, *, is_slow: bool = False) -> None:
        """Say that `phase` of `step` begins; for `is_slow` see `Beat`."""
        if step != self.last.step:
            self._count_step()
        self._finished.add(self.last.phase)
        self.last = Beat(step, phase, is_slow, time.time())

    def _count_step(self) -> None:
        busy_s = time.monotonic() - self.waited_s
        if self.work is None:
            self._began = busy_s
            self.work = Work(0, 0.0)
        else:
            # A run that is rolled back trains the same step again.
            self.work = Work(self.work.steps + 1, busy_s - self._began)

    def forget(self) -> None:
        """What phases have taken so far tells nothing of those to come."""
        self._finished.clear()
        self._longest_s.clear()

    def pass_time(self, seconds: float) -> None:
        """Let the time go by during which the process was running."""
        if self.last is self._watched:
            self.silent_s += seconds
            return
        phase = self._watched.phase
        self._longest_s[phase] = max(self.silent_s, self._longest_s.get(phase, 0.0))
        self._watched, self.silent_s = self.last, 0.0

    def allowed_s(self) -> float:
        """How long the rank may be silent in the phase that it is in."""
        beat = self._watched
        most_s = longest_silence_s(self._timeout_s)
        if beat.is_slow or beat.phase not in self._finished:
            return most_s
        longer_s = PATIENCE_LATER * self._longest_s.get(beat.phase, 0.0)
        return min(most_s, max(self._timeout_s, longer_s))

    def is_overdue(self) -> bool:
        return self.silent_s > self.allowed_s()
