"""Where all ranks of a job are, for people: through the job's store into one file."""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.flight_recorder import CollectiveTime
from parallel.heartbeat import HEARTBEATS, Heartbeat, Work
from parallel.stragglers import Slowest, StragglerDetector


class JobStatus:
    """Tells the store of this rank's heartbeat; on rank 0, writes down those of all.

    Attributes:
        slowest: the rank that waited least for the others lately, on rank 0. None as long as that
            is not known, and on GPUs whose collectives are not timed (see `CollectiveTime`).
    """

    def __init__(self, store: dist.Store, heart: Heartbeat) -> None:
        self.slowest: Slowest | None = None
        self._store = store
        self._heart = heart
        self._rank = dist.get_rank()
        self._keys = [f"heartbeat/{rank}" for rank in range(dist.get_world_size())]
        self._collective_time = CollectiveTime()
        self._stragglers = StragglerDetector()

    def report(self, folder: Path | None) -> None:
        """
        Args:
            folder: where rank 0 writes `heartbeats.json`, if anywhere.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        self._store.set(self._keys[self._rank], json.dumps(self._heartbeat()))
        if self._rank != 0 or not self._store.check(self._keys):
            return
        beats = [json.loads(beat) for beat in self._store.multi_get(self._keys)]
        works = [Work(**work) for beat in beats if (work := beat.pop("work"))]
        if folder:
            _write(beats, folder)
        if len(works) == len(beats) and (slowest := self._stragglers.compare(works)):
            self.slowest = slowest
            if slowest.is_persistent:
                beat = beats[slowest.rank]
                process = f"rank {slowest.rank} (process {beat['pid']} on {beat['host']})"
                print(f"warning: {process} {slowest}", flush=True)

    def _heartbeat(self) -> dict[str, Any]:
        beat, work = self._heart.last, self._heart.work
        if torch.cuda.is_available():
            self._heart.waited_s = self._collective_time.total_s()
            work = work if self._heart.waited_s else None
        return {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": beat.step,
            "phase": beat.phase,
            "beat": datetime.fromtimestamp(beat.at, UTC).isoformat(timespec="seconds"),
            "reported": datetime.now(UTC).isoformat(timespec="seconds"),
            "work": asdict(work) if work else None,
        }


def _write(beats: list[dict[str, Any]], folder: Path) -> None:
    # A file system that is full or gone is for those to report who need it.
    with suppress(OSError):
        aside = folder / f".{HEARTBEATS}"
        aside.write_text("[\n" + ",\n".join(map(json.dumps, beats)) + "\n]\n")
        aside.replace(folder / HEARTBEATS)
