"""Call something every now and then while other work is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread


@contextmanager
def ticking(tick: Callable[[], None], every_s: float) -> Iterator[Callable[[], None]]:
    """Call `tick` every so many seconds; what is yielded calls it at once."""
    ended, one_at_a_time = Event(), Lock()

    def safely() -> None:
        with one_at_a_time:
            tick()

    def keep_ticking() -> None:
        while not ended.wait(every_s):
            safely()

    thread = Thread(target=keep_ticking, daemon=True)
    thread.start()
    try:
        yield safely
    finally:
        ended.set()
        thread.join()
