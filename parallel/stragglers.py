"""Which rank computes for longer than the others, while they wait for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from parallel.heartbeat import Work

WINDOW_STEPS = 5
# What scatters from window to window stays below this; a throttled GPU is at 1.3 and more.
FACTOR = 1.25
PERSISTENT_WINDOWS = 3
LARGEST_FACTOR = 100


@dataclass(frozen=True)
class Slowest:
    """The rank that waited least for others in a window of steps.

    Attributes:
        rank: the one with the longest time outside of collectives.
        seconds: that time, per step.
        median: of all ranks; of an even number the lower of the two in the middle.
        is_persistent: whether to warn, once per rank: it has been the slowest by `FACTOR` in
            `PERSISTENT_WINDOWS` windows in a row.
    """

    rank: int
    seconds: float
    median: float
    is_persistent: bool

    @property
    def over_median(self) -> float:
        return self.seconds / self.median

    def __str__(self) -> str:
        return (
            f"is the slowest: its steps took {self.seconds:.3g} s outside of collectives, "
            f"{self.over_median:.2f} times the median rank's, in each of the last "
            f"{PERSISTENT_WINDOWS} reports. Look for a throttled device, a busy host, slow "
            "storage, or more layers in its pipeline stage"
        )


class StragglerDetector:
    """Compares what the ranks report of their work."""

    def __init__(self) -> None:
        self._before: Sequence[Work] | None = None
        self._suspect = -1
        self._windows = 0

    def compare(self, works: Sequence[Work]) -> Slowest | None:
        """The slowest rank since the last window, or None while this one is too short.

        Args:
            works: of all ranks, at the beginning of a step, which need not be the same for all.
        """
        if self._before is None:
            self._before = works
            return None
        pairs = list(zip(self._before, works, strict=True))
        if min(now.steps - before.steps for before, now in pairs) < WINDOW_STEPS:
            return None
        self._before = works
        per_step = [
            (now.busy_s - before.busy_s) / (now.steps - before.steps) for before, now in pairs
        ]
        seconds = max(per_step)
        # Sampled times below that tell nothing.
        median = max(median_low(per_step), seconds / LARGEST_FACTOR)
        if seconds <= 0:
            return None
        rank = per_step.index(seconds)
        return Slowest(rank, seconds, median, self._persists(rank, seconds / median))

    def _persists(self, rank: int, over_median: float) -> bool:
        if over_median < FACTOR:
            self._suspect, self._windows = -1, 0
        elif rank != self._suspect:
            self._suspect, self._windows = rank, 1
        else:
            self._windows += 1
        return self._windows == PERSISTENT_WINDOWS
