"""How long something takes, on CPUs and on GPUs, at next to no cost."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch

# Where nobody takes the time, as in an evaluation by itself: events of CUDA are limited.
MOST_SPANS = 4096

Span = tuple[torch.cuda.Event, torch.cuda.Event]


class Stopwatch:
    """Adds up the time spent within `running`, until it is taken.

    On a CPU it is the time of the calling thread. On a GPU, where calls return before the work is
    done, it is the time that its current stream takes from one end of the work to the other, also
    where it only waits for another stream.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[Span] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
            if len(self._spans) >= MOST_SPANS:
                self._add_up(list(takewhile(lambda span: span[1].query(), self._spans)))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """The seconds since they were taken last; waits for the end of what runs on a GPU."""
        if self._spans:
            self._spans[-1][1].synchronize()
        self._add_up(self._spans)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_up(self, first: Sequence[Span]) -> None:
        self._seconds += sum(begin.elapsed_time(end) for begin, end in first) / 1e3
        del self._spans[: len(first)]
