"""Independent tasks over processes that end with the one that started them."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from signal import SIG_BLOCK, SIG_SETMASK, SIGINT, pthread_sigmask
from threading import Thread
from typing import Any

from data_pipeline.errors import DataError


class WorkerDiedError(DataError):
    """A worker process was killed, most often for want of memory."""

    exit_code = 1


def do_each(
    task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[None]:
    """Call `task` with each tuple of arguments, and yield once for each that has finished.

    One worker is this process; more are spawned, so the arguments must pickle.

    Raises:
        WorkerDiedError: a worker process was killed.
        KeyboardInterrupt: raised in this process; the workers have been killed.
    """
    workers = min(workers, len(arguments))
    if workers <= 1:
        for one in arguments:
            task(*one)
            yield
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
        with _interrupt_blocked():
            futures = [pool.submit(task, *one) for one in arguments]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        except BrokenProcessPool as error:
            raise WorkerDiedError(
                "a worker process was killed, perhaps for want of memory. What was finished is "
                "kept: run the same command again, with fewer --workers"
            ) from error
        except KeyboardInterrupt:
            for worker in active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Start workers that leave a terminal's ctrl-C to their parent."""
    before = pthread_sigmask(SIG_BLOCK, {SIGINT})
    try:
        yield
    finally:
        pthread_sigmask(SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: nothing else would tell it."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
