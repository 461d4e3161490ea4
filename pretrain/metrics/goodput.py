"""How much of the time since a run began went into steps that stand."""

import json
import time
from collections import deque
from typing import Any

from pretrain.metrics.sinks import read_metrics
from pretrain.run_dir import RunDirectory, write_atomically


class Goodput:
    """Adds up the seconds of steps, over all attempts of a run.

    Steps count once they are learned from, and no longer once they are undone: what is added up
    stands in each row, and rows of steps that are undone are dropped. What is not in these seconds
    is lost: time between attempts, starting, checkpoints, skipped batches, and what was trained
    twice.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        if not run.began.exists():
            write_atomically(run.began, json.dumps({"time": time.time()}) + "\n")
        self._began: float = json.loads(run.began.read_text())["time"]
        self.go_back()

    def add(self, seconds: float) -> None:
        """A step was taken."""
        self._productive_s += seconds

    def go_back(self) -> None:
        """The last row is now that of the step that training goes on from."""
        last = deque(read_metrics(self._run.metrics), maxlen=1)
        self._productive_s: float = last[0].get("perf/productive_s", 0.0) if last else 0.0

    def metrics(self) -> dict[str, Any]:
        elapsed_s = time.time() - self._began
        # The clock may have been set back.
        share = min(1.0, self._productive_s / elapsed_s) if elapsed_s > 0 else 1.0
        return {"perf/productive_s": self._productive_s, "perf/goodput": share}
