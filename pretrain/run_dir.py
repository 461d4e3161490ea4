"""The folder of one run: the only place that knows which file lies where."""

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pretrain.errors import AttemptError, FencedError, TrainingError, UserError

# The number of the attempt that a launcher has made, in the environment of its ranks.
ATTEMPT_VARIABLE = "FARSPAN_ATTEMPT"
# What file systems say that have no locks, such as Lustre without `-o flock`.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What a node or a server of a network file system has for a while.
PASSING = (errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ETIMEDOUT)


class WriteError(TrainingError):
    """A file of the run directory cannot be written: told without a traceback."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside it `path` is written: an error of an open file does not carry its name.

    Raises:
        WriteError: no room, say, or a file system that fails.
        FileNotFoundError: its folder is not there, which the caller knows how to tell.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WriteError(_cannot_be_written(str(path), error)) from error


def _cannot_be_written(what: str, error: OSError) -> str:
    return (
        f"{what} cannot be written: {error.strerror}. The run directory has to be on a writable "
        "file system, with room left and owned by you: once it is, the same command goes on from "
        "the newest checkpoint. A new run may choose another one"
    )


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text`: a reader sees the old file or the new one, never a half.

    Raises: as `writing`.
    """
    _put_into_place(path.with_name(f".{path.name}.{os.getpid()}"), path, text)


def _put_into_place(aside: Path, path: Path, text: str) -> None:
    with writing(path):
        try:
            with aside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        sync_folder(path.parent)


def _this_process() -> str:
    attempt = os.environ.get(ATTEMPT_VARIABLE)
    of = f", attempt {attempt}" if attempt else ""
    return f"process {os.getpid()} on {socket.gethostname()}{of}"


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run: resolved configuration, metrics, checkpoints, per-attempt logs, report.

    A run is trained in attempts, numbered from 1, of which one at a time may change the directory:

    - Rank 0 holds the lock file as long as it lives (`exclusive`). Where `flock` works, which it
      does on one machine and on most network file systems, nobody else gets further than that.
    - Where it does not, or where a machine that was cut off has lost its lock, an old attempt may
      live on beside a newer one. `begin_attempt` fences it off: whoever commits something calls
      `check_attempt` right before. What is renamed into place from a folder of the attempt's own
      (`aside`, as `commit` does) is safe even between check and rename: the newer attempt has
      removed that folder, and the rename fails. What goes elsewhere, such as to an object store,
      can still arrive if the newer attempt begins within that moment.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def began(self) -> Path:
        """When rank 0 of its first attempt that trained was started, in seconds since the epoch."""
        return self.root / "began.json"

    @property
    def time_spent(self) -> Path:
        """What the time since then went into, up to the newest checkpoint or the end."""
        return self.root / "time.json"

    @property
    def ledger(self) -> Path:
        """Which tokens were trained at which step, over all attempts."""
        return self.root / "ledger.bin"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def wandb_id(self) -> Path:
        """The id of the W&B run that every attempt continues."""
        return self.wandb / "run_id"

    @property
    def wandb_step(self) -> Path:
        """How many rows all attempts have given to W&B."""
        return self.wandb / "rows"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def evaluations(self) -> Path:
        """What `farspan eval --suite` has found, a file for each suite and checkpoint."""
        return self.root / "evals"

    def evaluation(self, suite: str, step: int) -> Path:
        return self.evaluations / f"{suite}-{step:08d}.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def done(self) -> Path:
        """The success marker: a run without it has not finished."""
        return self.root / "done.json"

    @property
    def stopped(self) -> Path:
        """Where and why the newest attempt stopped on request; gone once another one begins."""
        return self.root / "stopped.json"

    @property
    def cancelled(self) -> Path:
        """Marks a run that a person has cancelled; gone once it is started by one again."""
        return self.root / "cancelled.json"

    @property
    def launcher_lock(self) -> Path:
        """Held by whoever starts attempts; it says which process on which host held it last."""
        return self.root / "launcher.lock"

    @property
    def job(self) -> Path:
        """What was submitted to Slurm, and which jobs have come of it."""
        return self.root / "job.json"

    @property
    def excluded(self) -> Path:
        """The nodes that jobs of the run avoid, until when and why."""
        return self.root / "excluded.json"

    @property
    def attempt(self) -> Path:
        """The number of the attempt that may change the run directory."""
        return self.root / "attempt.json"

    @property
    def changes(self) -> Path:
        """Settings that changed since the attempt before; an attempt that begins takes it along."""
        return self.root / "changes.jsonl"

    @property
    def saved(self) -> Path:
        """The newest checkpoint that was committed, and where."""
        return self.root / "saved.json"

    @property
    def id(self) -> Path:
        """By which a folder of checkpoints elsewhere knows its run."""
        return self.root / "id"

    @property
    def imported(self) -> Path:
        """Whose weights the run begins with, of which the checkpoint of step 0 is made."""
        return self.root / "imported.json"

    @property
    def versions(self) -> Path:
        """Of Python, torch and farspan, and the git revision."""
        return self.root / "versions.json"

    @property
    def data(self) -> Path:
        """What the run knows of its data: hashes, unigram entropy, why documents were dropped."""
        return self.root / "data.json"

    @property
    def funnel(self) -> Path:
        """Of each source, what the steps of its data run dropped, with examples, if it is known."""
        return self.root / "funnel.json"

    def folder_of(self, attempt: int) -> Path:
        """Where the logs of an attempt lie."""
        return self.attempts / f"{attempt:04d}"

    def config_of(self, attempt: int) -> Path:
        """The resolved configuration that an attempt had."""
        return self.folder_of(attempt) / "config.yaml"

    def failure_of(self, attempt: int) -> Path:
        """What an attempt died of."""
        return self.folder_of(attempt) / "failure.json"

    def environment_of(self, attempt: int) -> Path:
        """The variables that an attempt's ranks were given, and why."""
        return self.folder_of(attempt) / "environment.json"

    def allocation_of(self, attempt: int) -> Path:
        """The job and the nodes that an attempt had under Slurm."""
        return self.folder_of(attempt) / "allocation.json"

    def ranks_of(self, attempt: int) -> Path:
        """How many ranks an attempt had, and their layout."""
        return self.folder_of(attempt) / "ranks.json"

    def samples_of(self, attempt: int) -> Path:
        """What an attempt was trained on first, as text, for W&B."""
        return self.folder_of(attempt) / "samples.json"

    def aside(self, attempt: int) -> Path:
        """Where an attempt writes what it then renames into place; gone once another begins."""
        return self.root / "aside" / f"{attempt:04d}"

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the run directory: one process at a time may change it.

        Raises:
            UserError: another process holds it, and the message says which; or it is read-only.
            AttemptError: its file system has a fault that may pass.
            WriteError: there is no room to note who holds it.
        """
        return self._hold(self._lock)

    def take_from(self, attempt: int) -> str | None:
        """Take the run directory from an attempt that nobody reaches any more.

        Its rank 0 may live on, on a machine that is cut off from all but the file system, and
        holds the lock. Another lock file gets the name, and the next attempt fences it off.

        Args:
            attempt: one that is over, according to who started it.

        Returns:
            The process that holds the directory; None if it is not that attempt's.
        """
        # NFS has exclusive locks only for a file that is open for writing.
        with suppress(OSError), self._lock.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read().decode().strip()
                if holder.endswith(f", attempt {attempt}"):
                    self._lock.unlink()
                    return holder
        return None

    @property
    def _lock(self) -> Path:
        return self.root / "lock"

    def launching(self) -> AbstractContextManager[None]:
        """Hold the right to start attempts, also between two of them; raises as `exclusive`."""
        return self._hold(self.launcher_lock)

    @contextmanager
    def _hold(self, path: Path) -> Iterator[None]:
        try:
            file = path.open("a+b", buffering=0)
        except OSError as error:
            kind = AttemptError if error.errno in PASSING else UserError
            raise kind(self.explain(error)) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().decode().strip() or "another process"
                raise UserError(
                    f"{self.root} is in use by {holder}: wait for it, or stop it (SIGTERM saves "
                    "first)"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"warning: the file system of {self.root} has no locks ({error.strerror}): "
                    "start no second job on it; an older attempt is fenced off",
                    file=sys.stderr,
                    flush=True,
                )
            with writing(path):
                file.truncate(0)
                file.write(f"{_this_process()}\n".encode())
            yield

    def all_attempts(self) -> list[int]:
        """The numbers of the attempts that have been made, the newest last."""
        if not self.attempts.is_dir():
            return []
        return sorted(int(path.name) for path in self.attempts.iterdir() if path.name.isdigit())

    def new_attempt(self) -> int:
        """Make the folder of the next attempt, for its logs; it has not begun yet."""
        self.attempts.mkdir(exist_ok=True)
        number = 1 + max(self.all_attempts(), default=0)
        while True:
            try:
                self.folder_of(number).mkdir()
            except FileExistsError:
                number += 1
            else:
                return number

    def begin_attempt(self, number: int | None = None) -> int:
        """Begin an attempt and fence off those before it; called with the directory held.

        Args:
            number: of an attempt that `new_attempt` has made; None makes the next one.

        Raises:
            FencedError: a newer attempt has begun already.
        """
        number = number or self.new_attempt()
        if self.current_attempt() > number:
            self.check_attempt(number)
        write_atomically(self.attempt, json.dumps({"attempt": number}) + "\n")
        shutil.rmtree(self.aside(number).parent, ignore_errors=True)
        self.aside(number).mkdir(parents=True)
        self.stopped.unlink(missing_ok=True)
        if self.changes.exists():
            self.changes.rename(self.folder_of(number) / self.changes.name)
        return number

    def current_attempt(self) -> int:
        """The attempt that has begun last, 0 before the first."""
        try:
            return int(json.loads(self.attempt.read_text())["attempt"])
        except FileNotFoundError:
            return 0

    def check_attempt(self, attempt: int) -> None:
        """Make sure that `attempt` may still change the run directory.

        Raises:
            FencedError: another attempt has begun.
            TrainingError: the run directory is gone.
        """
        current = self.current_attempt()
        if not current:
            raise TrainingError(self._gone())
        if current != attempt:
            raise FencedError(
                f"attempt {current} of {self.root} has begun; this one, attempt {attempt}, has "
                "ended without changing anything more"
            )

    def commit(self, attempt: int, path: Path, text: str) -> None:
        """Replace `path` with `text`, as `write_atomically` does, on behalf of `attempt`.

        Raises: as `check_attempt`, even if another attempt begins in the middle, and WriteError.
        """
        self.check_attempt(attempt)
        try:
            _put_into_place(self.aside(attempt) / path.name, path, text)
        except FileNotFoundError:
            self.check_attempt(attempt)
            raise

    def mark_done(self, step: int, attempt: int) -> None:
        """Write the success marker for a run that has finished `step` steps."""
        self.commit(attempt, self.done, json.dumps({"step": step, "attempt": attempt}) + "\n")

    def mark_saved(self, step: int, attempt: int, target: str) -> None:
        """Write down that there is a checkpoint of `step` steps in `target`."""
        marker = {"step": step, "checkpoints": target, "attempt": attempt}
        self.commit(attempt, self.saved, json.dumps(marker) + "\n")

    def refuse_to_begin_anew(self, target: str) -> None:
        """Called where no checkpoint was found in `target`.

        Raises:
            UserError: there has been one.
        """
        if not self.saved.exists():
            return
        marker = json.loads(self.saved.read_text())
        raise UserError(
            f"no checkpoint in {target}, but the run has saved step {marker['step']} in "
            f"{marker['checkpoints']}: is its file system there, and has checkpoint.dir changed? "
            f"Bring the checkpoints back to {target}; or remove {self.saved} to begin the run anew"
        )

    def refuse_initial_weights(self, target: str) -> None:
        """Called where training would begin, and there is no checkpoint of step 0 in `target`.

        Raises:
            UserError: the run begins with the weights of others.
        """
        if not self.imported.exists():
            return
        source = json.loads(self.imported.read_text())["source"]
        raise UserError(
            f"no checkpoint in {target} that the run could begin with: its first weights are those "
            f"of {source} ({self.imported}). If their import was cut short, the same `farspan "
            "import` again completes it; later it takes another --run-dir"
        )

    def mark_stopped(self, step: int, attempt: int, reason: str) -> None:
        """Write down that the run has stopped on request, with everything saved."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        marker = {"step": step, "attempt": attempt, "reason": reason, "time": time}
        self.commit(attempt, self.stopped, json.dumps(marker) + "\n")

    def is_cause_of(self, error: OSError) -> bool:
        """Whether an operation on the run directory has failed.

        Where there is no room for what goes through an open file, no name says which: of those the
        logs of the ranks are the ones that nobody else tells.
        """
        if error.filename is None and error.errno in NO_ROOM:
            return True
        return not self.root.is_dir() or str(error.filename).startswith(f"{self.root}{os.sep}")

    def explain(self, error: OSError) -> str:
        """What to tell about an operation on the run directory that has failed."""
        if not self.root.is_dir():
            return self._gone()
        what = error.filename or f"a file of {self.root}, such as a log in {self.attempts},"
        return _cannot_be_written(str(what), error)

    def _gone(self) -> str:
        if not self.root.is_dir():
            return (
                f"the run directory {self.root} is gone: removed, renamed, or on a file system "
                "that is no longer there. Bring it back, and the same command goes on from its "
                "newest checkpoint"
            )
        return (
            f"{self.attempt} is gone, which says who may change the run directory; the same "
            "command goes on from the newest checkpoint"
        )
