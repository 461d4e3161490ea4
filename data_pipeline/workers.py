"""Tasks in processes of their own: what kills one of them is noticed, and ends with it."""

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, cast

from data_pipeline.errors import DataError

# A copy of this process, with all that it has imported and loaded, in milliseconds.
FORK = get_context("fork")
AGAIN = "What was finished is kept: run the same command again, with fewer --workers"


class WorkerDiedError(DataError):
    """A worker process did not come to its end; `by` says what ended it, as in SIGSEGV."""

    exit_code = 1
    by: str = ""


def do_each(
    task: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    workers: int,
    advice: str = AGAIN,
) -> Iterator[Any]:
    """Call `task` with each tuple of arguments, and yield what it returns once it has finished.

    Each call is a process, at most `workers` at a time. Where that is killed, the task is called
    once more, with `is_careful=True` if it takes that. The first argument names it in messages.

    Args:
        advice: what to do when the second call is killed, too.

    Raises:
        WorkerDiedError: the process of the second call was killed, too.
        KeyboardInterrupt: raised in this process; the workers have been killed.
    """
    can_be_careful = "is_careful" in signature(task).parameters
    waiting = deque((one, False) for one in arguments)
    at_work: dict[Connection, tuple[BaseProcess, tuple[Any, ...], bool]] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < workers:
                one, is_second = waiting.popleft()
                careful = {"is_careful": True} if is_second and can_be_careful else {}
                process, result = _start(task, *one, **careful)
                at_work[result] = process, one, is_second
            for ended in wait(list(at_work)):
                result = cast(Connection, ended)
                process, one, is_second = at_work.pop(result)
                try:
                    value = _take(process, result, _name(one[0]))
                except WorkerDiedError as died:
                    if is_second:
                        raise WorkerDiedError(
                            f"{died}, and one before, perhaps for want of memory. {advice}"
                        ) from died
                    how = ", each document by itself" if can_be_careful else ""
                    print(f"warning: {died}; it is done again{how}", file=sys.stderr, flush=True)
                    waiting.appendleft((one, True))
                else:
                    yield value
    finally:
        for process, _, _ in at_work.values():
            process.kill()
            process.join()


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, or its exception.

    Raises:
        WorkerDiedError: the process was killed.
    """
    process, result = _start(function, *arguments)
    return _take(process, result, function.__name__)


def _start(
    function: Callable[..., Any], *arguments: Any, **options: bool
) -> tuple[BaseProcess, Connection]:
    result, sent = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send_result, args=(sent, function, arguments, options))
    process.start()
    sent.close()
    return process, result


def _take(process: BaseProcess, result: Connection, name: object) -> Any:
    try:
        value, error = result.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        died = WorkerDiedError(f"{name}: its process was ended by {by}")
        died.by = by
        raise died from None
    finally:
        result.close()
    process.join()
    if error is not None:
        raise error
    return value


def _name(argument: object) -> object:
    return getattr(argument, "name", argument)


def _send_result(
    sent: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, bool],
) -> None:
    """Send what the function returns and None, or None and its exception."""
    # A terminal's ctrl-C is the parent's to handle, whose handlers and wake-up are not this one's.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Bars on a terminal put others in their place, with locks that a thread may have held just now.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    _end_with_parent()
    outcome: tuple[Any, Exception | None]
    try:
        outcome = function(*arguments, **options), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        outcome = None, error
    sent.send(outcome)


def _end_with_parent() -> None:
    """End this process when its parent is killed: nothing else would tell it."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
