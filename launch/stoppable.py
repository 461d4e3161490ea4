"""Commands that may be stopped at any time, and go on when they are repeated."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from rich.console import Console

from pretrain.errors import STOPPED_ON_REQUEST


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """End on SIGTERM and ctrl-C with one line and the exit code for what can be continued.

    A thread does so: Python's own handlers wait until native code returns to the main thread. What
    is on disk is good at any time, so that nothing else need be saved; workers end with this one.
    """
    signalled, wakeup = socket.socketpair()
    wakeup.setblocking(False)

    def stop() -> None:
        if not signalled.recv(1):
            return
        print("stopped; the same command continues", file=sys.stderr, flush=True)
        console.show_cursor()
        os._exit(STOPPED_ON_REQUEST)

    signal.set_wakeup_fd(wakeup.fileno())
    before = {
        number: signal.signal(number, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    Thread(target=stop, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        wakeup.close()
