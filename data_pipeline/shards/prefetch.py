"""Work done in the background, in the order in which its results are needed."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from threading import Lock, Thread

from data_pipeline.errors import DataError

THREADS = 4

log = logging.getLogger(__name__)


class Prefetch:
    """A few threads that live as long as there is something to do."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._tasks: deque[Callable[[], object]] = deque()
        self._threads = 0

    def replace(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Do these next, instead of those that have not begun."""
        with self._lock:
            self._tasks = deque(tasks)
            missing = min(THREADS - self._threads, len(self._tasks))
            self._threads += missing
        for _ in range(missing):
            Thread(target=self._work, name="prefetch", daemon=True).start()

    def _next(self) -> Callable[[], object] | None:
        with self._lock:
            if self._tasks:
                return self._tasks.popleft()
            self._threads -= 1
            return None

    def _work(self) -> None:
        while task := self._next():
            try:
                task()
            except DataError as error:
                # Whoever needs the result does the same and gets the error.
                log.warning("prefetch: %s", error)
