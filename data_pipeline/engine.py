"""Where the tasks of a stage are done: in processes of this machine or on a Ray cluster.

A task is a function and arguments that pickle. It reads files and leaves a finished stage
(`data_pipeline.stage`), so that it can be done again, or twice at a time, on any machine that sees
the files; between machines nothing travels but arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import DataError
from data_pipeline.workers import do_each

NATIVE = "native"


class Engine(Protocol):
    @property
    def workers(self) -> int:
        """How many tasks are done at a time."""

    def do_each(
        self,
        task: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        folder: Path,
        prepare: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """Call `task` with each tuple of arguments, and yield once for each that has finished.

        One whose process is killed is called again, see `workers.do_each`.

        Args:
            folder: where the tasks leave what they make, for all of them to see.
            prepare: called first in each process that those of the tasks are copies of.

        Raises:
            WorkerDiedError: processes were killed again and again.
        """


@dataclass(frozen=True)
class Native:
    """Processes of this machine."""

    workers: int

    def do_each(
        self,
        task: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        folder: Path,
        prepare: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        if arguments and prepare:
            prepare()
        return do_each(task, arguments, self.workers)


def open_cluster(name: str) -> Engine | None:
    """The engine of a name; None for `native`, where threads share what a task would be.

    Raises:
        DataError: as `open_engine`.
    """
    return None if name == NATIVE else open_engine(name)


def open_engine(name: str, workers: int = 1) -> Engine:
    """The engine of a name.

    Args:
        name: `native`; `ray` for the cluster that runs on this machine or is started on it; or
            `ray=ADDRESS`.
        workers: processes of the native engine; those of a cluster are its own.

    Raises:
        DataError: another name, or Ray is not installed or does not answer.
    """
    kind, separator, address = name.partition("=")
    if name == NATIVE:
        return Native(workers)
    if kind == "ray" and bool(separator) == bool(address):
        from data_pipeline.ray_engine import open_ray

        return open_ray(address or None)
    raise DataError(
        f"engine={name} is not allowed: it is {NATIVE}, ray or ray=ADDRESS, as in ray=10.0.0.1:6379"
    )
