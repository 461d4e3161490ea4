"""Requests to stop, from a person or a scheduler."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """SIGTERM or SIGUSR2 ask for a checkpoint and an orderly end, at the next step boundary.

    A launcher may start the process with these signals blocked, so that one which comes early
    waits until here.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
