"""Requests to stop, from a person or a scheduler."""

import signal
from types import FrameType


class StopRequest:
    """SIGTERM or SIGUSR2 ask for a checkpoint and an orderly end, at the next step boundary."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
