"""Tasks on a Ray cluster: a row of a Daft table each, a partition each."""

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Thread
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.workers import WorkerDiedError, do_each

# In a row, without a task done in between.
MOST_FAILURES = 3
CONNECT_S = 10
# By a file whose name begins so workers tell whether they see the folder.
MARK = ".seen-by-all-"
# Daft's runner draws bars, and would do so from the cluster's processes.
ENVIRONMENT = {"DAFT_PROGRESS_BAR": "0"}


def open_ray(address: str | None) -> "RayEngine":
    """Connect to a cluster; without an address, to the one that runs here or is started here.

    Raises:
        DataError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise DataError("engine=ray needs Ray: pip install 'farspan[ray]'") from error
    import daft

    try:
        if address is not None:
            _require_answer(address)
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": ENVIRONMENT},
            ignore_reinit_error=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        place = "on this machine" if address is None else f"at {address}"
        raise DataError(
            f"engine=ray: no cluster answers {place} ({error}); start one with `ray start`, or "
            "leave --engine away"
        ) from error
    daft.set_runner_ray(noop_if_initialized=True)
    return RayEngine()


def _require_answer(address: str) -> None:
    """Raise OSError or ValueError where Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_S).close()


@dataclass(frozen=True)
class RayEngine:
    """The cluster that this process is connected to."""

    @property
    def workers(self) -> int:
        """Processors of the cluster, as it is now."""
        import ray

        return int(ray.cluster_resources().get("CPU", 1))

    def do_each(
        self,
        task: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        folder: Path,
        prepare: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """See `engine.Engine`. Daft gives the task of a lost worker to another one."""
        for left_behind in folder.glob(f"{MARK}*"):
            # By a command that was killed; the folder's lock is ours now.
            left_behind.unlink(missing_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=MARK) as mark:
            left = {
                number: pack(number, Path(mark.name), prepare, task, one)
                for number, one in enumerate(arguments)
            }
            failures = 0
            while left:
                try:
                    for number in _done(list(left.values())):
                        del left[number]
                        failures = 0
                        yield
                except _cluster_errors() as error:
                    failures += 1
                    text = f"the Ray cluster failed with {len(left)} tasks left ({error})"
                    if failures == MOST_FAILURES:
                        raise WorkerDiedError(
                            f"{text}, {failures} times in a row. What was finished is kept: run "
                            "the same command again"
                        ) from error
                    print(f"warning: {text}; they are done again", file=sys.stderr, flush=True)


def pack(
    number: int,
    mark: Path,
    prepare: Callable[[], None] | None,
    task: Callable[..., None],
    arguments: tuple[Any, ...],
) -> bytes:
    """A task as `main` reads it, in the form in which it travels.

    Args:
        mark: a file in the folder that its worker has to see.
    """
    # Paths may be relative, and the cluster's processes work in other folders.
    return pickle.dumps((number, Path.cwd(), mark, prepare, task, arguments))


def _cluster_errors() -> tuple[type[Exception], ...]:
    from daft.exceptions import DaftCoreException
    from ray.exceptions import RayError

    return RayError, DaftCoreException


def _done(tasks: list[bytes]) -> Iterator[int]:
    """The numbers of tasks as they are done; raises the exception of one that fails."""
    import daft

    do_row = daft.func(_do_apart, return_dtype=daft.DataType.binary(), use_process=False)
    table = daft.from_pydict({"task": tasks}).into_partitions(len(tasks))
    done = table.select(do_row(daft.col("task")).alias("result"))
    for row in done.iter_rows(results_buffer_size=None):
        number, error = pickle.loads(row["result"])
        if error is not None:
            raise error
        yield number


def _do_apart(task: bytes) -> bytes:
    """Do a task in a Python of its own: one with threads, such as this one, must not be forked."""
    program = [sys.executable, "-m", __name__]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # Left open until the other one has ended, which ends itself when this one does.
        process.stdin.write(len(task).to_bytes(8, "big") + task)
        process.stdin.flush()
        result = process.stdout.read()
        process.wait()
    if process.returncode == 0:
        return result
    died = WorkerDiedError(
        f"a process on {socket.gethostname()} ended with code {process.returncode}, perhaps for "
        "want of memory. What was finished is kept: run the same command again"
    )
    return pickle.dumps((pickle.loads(task)[0], died))


def main() -> None:
    """Read a task, do it, and write its number and the exception that ended it, or None."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    content = sys.stdin.buffer.read(size)
    Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "wb") as result:
        os.dup2(2, 1)  # what a task prints belongs into the worker's log
        number, folder, mark, prepare, task, arguments = pickle.loads(content)
        error: Exception | None = None
        try:
            _enter(folder)
            _refuse_unseen(mark)
            if prepare:
                prepare()
            for _ in do_each(task, [arguments], 1):
                pass
        except Exception as raised:
            error = raised
        pickle.dump((number, error), result)


def _enter(folder: Path) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise _unseen(folder, "start the command in a folder") from error


def _refuse_unseen(mark: Path) -> None:
    if not mark.exists():
        raise _unseen(mark.parent, "choose an --out")


def _unseen(folder: Path, advice: str) -> DataError:
    return DataError(
        f"{folder}: the Ray worker on {socket.gethostname()} does not see it as it is here; "
        f"{advice} on a file system that all nodes share"
    )


def _end_with_parent() -> None:
    """End this process, and with it those that it has started, when its parent is killed."""
    if not os.read(0, 1):  # not through `sys.stdin`, which Python could not close meanwhile
        os._exit(1)


if __name__ == "__main__":
    main()
