"""Calls that a hostile page can neither stall nor crash: it ends the process that read it."""

from collections.abc import Callable
from signal import ITIMER_PROF, setitimer
from typing import Any

from data_pipeline.extract.text import ExtractError
from data_pipeline.workers import WorkerDiedError, call_apart

MAX_SECONDS = 60.0
TRIES = 2  # of a page: what ended the first one may have been no fault of its own
OUT_OF_TIME = "SIGPROF"
# Reasons of pages that must not be read again in a process that is to live on.
TOO_SLOW, CRASHED = "too slow", "crashed"


def call_in_time(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """What a function returns; this process is ended if that takes more seconds of CPU.

    The kernel counts them, so that native code is ended, too, and waiting is free.
    """
    setitimer(ITIMER_PROF, seconds)
    try:
        return function(*arguments)
    finally:
        setitimer(ITIMER_PROF, 0)


def call_in_time_apart(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """`call_in_time` in a process of its own.

    Raises:
        ExtractError: that process was ended; reason `too slow` or `crashed`.
    """
    for _ in range(TRIES):
        try:
            return call_apart(_call, function, arguments, seconds)
        except WorkerDiedError as error:
            ended_by = error.by
            if ended_by == OUT_OF_TIME:
                raise ExtractError(TOO_SLOW, f"over {seconds:g} seconds of CPU") from None
    raise ExtractError(CRASHED, f"ended by {ended_by}, {TRIES} times")


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
    return call_in_time(function, *arguments, seconds=seconds)
