"""Wait for other nodes, whose ranks start when they can."""

import time
from collections.abc import Callable

POLL_S = 0.1


def wait_until(condition: Callable[[], bool], patience_s: float) -> bool:
    """Whether a condition has come true in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
