"""The folder of one run: the only place that knows which file lies where."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text`: a reader sees the old file or the new one, never a half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run: resolved configuration, metrics, checkpoints, per-attempt logs, report."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

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
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def done(self) -> Path:
        """The success marker: a run without it has not finished."""
        return self.root / "done.json"

    @property
    def data(self) -> Path:
        """What the run knows of its data: hashes, unigram entropy, why documents were dropped."""
        return self.root / "data.json"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run directory: one process at a time may change it.

        Raises:
            UserError: another process holds it; the message says which.
        """
        with (self.root / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{self.root} is in use by {file.read().strip() or 'another process'}: wait "
                    "for it, or stop it (SIGTERM saves first)"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def new_attempt(self) -> Path:
        """Make the folder of the next attempt, which holds one log per rank."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name) for path in self.attempts.iterdir()), default=0)
        while True:
            attempt = self.attempts / f"{number:04d}"
            try:
                attempt.mkdir()
            except FileExistsError:
                number += 1
            else:
                return attempt

    def mark_done(self, step: int) -> None:
        """Write the success marker for a run that has finished `step` steps."""
        write_atomically(self.done, json.dumps({"step": step}) + "\n")
