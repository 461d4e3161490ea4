"""Requests to stop, from a person or a scheduler."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """SIGTERM or SIGUSR2 ask for a checkpoint and an orderly end, at the next step boundary.

    A launcher may start the process with these signals blocked, so that one which comes early
    waits until here. One that comes again, or after the last step, changes nothing.

    Attributes:
        requested: whether this rank was asked.
        reason: the signal by which, in words.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = "another rank was asked to stop"
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.reason = f"asked to stop by {signal.Signals(number).name}"
        self.requested = True
