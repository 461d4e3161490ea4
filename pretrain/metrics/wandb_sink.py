"""Mirrors what a run logs to Weights & Biases, from a thread that training never waits for."""

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal

import numpy as np

from pretrain.config import Config
from pretrain.errors import TrainingError
from pretrain.metrics.credentials import all_without_credentials
from pretrain.metrics.samples import COLUMNS, NAME, Beginnings, Sample, write_samples
from pretrain.run_dir import RunDirectory, write_atomically

Row = Mapping[str, Any]
Mode = Literal["offline", "online"]

# What the end of an attempt waits for W&B at most: Slurm's grace may be half a minute.
CLOSE_TIMEOUT_S = 15.0
# If it has not even begun so long after the start of the attempt, no server answers.
BEGIN_TIMEOUT_S = 10.0
INIT_TIMEOUT_S = 60.0
STEP_DIGITS = 20
BINS = 32
# Lists of which part n is of tokens predicted from 2^n and more others.
BY_POSITION = ("train/loss_by_position", "train/loss_tokens_by_position")
# The sha256 of its manifest and of its tokenizer, and its weight.
OF_DATA = ("shards", "tokenizer", "weight")


def scalars(row: Row) -> dict[str, int | float]:
    """The numbers of a row, also those in mappings, whose keys become part of the name, and losses
    by position: their histogram would not tell which is where.
    """
    numbers: dict[str, int | float] = {}
    for name, value in _positions_named(row).items():
        if isinstance(value, int | float):
            numbers[name] = value
        elif isinstance(value, Mapping):
            numbers |= scalars({f"{name}/{key}": item for key, item in value.items()})
    return numbers


def _positions_named(row: Row) -> Row:
    by_position = {name: row[name] for name in BY_POSITION if name in row}
    return {
        **row,
        **{
            name: {str(1 << n): value for n, value in enumerate(values)}
            for name, values in by_position.items()
        },
    }


def histograms(row: Row) -> dict[str, Any]:
    """Lists, such as the load of each expert, as what W&B draws as a heat map over the steps."""
    import wandb

    lists = {
        name: np.ravel(np.asarray(value, dtype=float))
        for name, value in row.items()
        if isinstance(value, list) and name not in BY_POSITION
    }
    finite = {name: values[np.isfinite(values)] for name, values in lists.items()}
    return {
        name: wandb.Histogram(np_histogram=np.histogram(values, bins=BINS))
        for name, values in finite.items()
        if values.size
    }


def table_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """Documents as a table of W&B's; nothing if there are none."""
    import wandb

    if not samples:
        return {}
    return {NAME: wandb.Table(columns=list(COLUMNS), data=[astuple(one) for one in samples])}


class WandbSink:
    """Mirrors each row to Weights & Biases against train/step: numbers, and histograms of lists.

    One rank creates it. `offline` needs neither an account nor the network and leaves the run
    under RUN/wandb; `farspan wandb sync` sends it. `online` without a key, or without a server
    that answers, goes on offline. The run's id is kept in the run directory, so that every attempt
    continues the same W&B run; rows after the checkpoint an attempt resumed from stand there twice.

    All of W&B happens in a thread, as its start takes seconds and a server may not answer for
    minutes. A failure is told once on stderr and ends the mirroring, never the training:
    metrics.jsonl has all rows, and `farspan wandb sync` sends those that are missing.
    """

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self._tasks: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._begun = Event()
        self._begin_until = time.monotonic() + BEGIN_TIMEOUT_S
        self._thread: Thread | None = None
        if config.wandb.mode != "disabled":
            # At once: an attempt may end before its thread has come so far. What cannot be written
            # now the thread will tell.
            with suppress(OSError, TrainingError):
                run.wandb.mkdir(parents=True, exist_ok=True)
                wandb_id(run.wandb_id)
            self._thread = Thread(
                target=self._mirror,
                args=(run, config, config.wandb.mode),
                name="wandb",
                daemon=True,
            )
            self._thread.start()

    def write(self, row: Row) -> None:
        self._do(lambda mirror: mirror.log(row))

    def show(self, beginnings: Beginnings, sources: Sequence[str]) -> None:
        """Show documents as a table, with the next row.

        Args:
            sources: their names.
        """
        self._do(lambda mirror: mirror.show(beginnings, sources))

    def alert(self, title: str, text: str) -> None:
        """Let W&B tell whoever asked for alerts of the project."""
        self._do(lambda mirror: mirror.alert(title, text))

    def close(self) -> None:
        """End the mirroring; waits CLOSE_TIMEOUT_S at most for what W&B has not taken yet."""
        if self._thread is None:
            return
        self._tasks.put(None)
        if self._begun.wait(max(0.0, self._begin_until - time.monotonic())):
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            _tell("not everything has arrived by the end of the attempt")
        self._thread = None

    def _do(self, task: Callable[[Any], None]) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._tasks.put(task)

    def _mirror(self, run: RunDirectory, config: Config, mode: Mode) -> None:
        try:
            mirror = Mirror(run, _start(run, config, mode))
            self._begun.set()
            while task := self._tasks.get():
                task(mirror)
            mirror.finish()
        except Exception as error:
            _tear_down()
            _tell(f"stopped mirroring, training goes on: {error!r}")
        finally:
            self._begun.set()


class Mirror:
    """A W&B run that has begun, and the numbers of its rows.

    W&B keeps one row of each `_step`, and drops those below the last one. So rows are numbered over
    all attempts, not by train/step, of which a resumed attempt logs some again.
    """

    def __init__(self, run: RunDirectory, wandb_run: Any) -> None:
        self._run = wandb_run
        self._numbers = os.open(run.wandb_step, os.O_RDWR | os.O_CREAT, 0o666)
        self._next = wandb_run.step
        self._directory = run
        self._samples: list[Sample] = []

    def show(self, beginnings: Beginnings, sources: Sequence[str]) -> None:
        self._samples = beginnings.as_text(self._directory.tokenizer, sources)

    def log(self, row: Row, samples: Sequence[Sample] = ()) -> None:
        """
        Args:
            samples: to show with it.
        """
        if self._samples:
            samples, self._samples = self._samples, []
            attempt = self._directory.current_attempt()
            write_samples(self._directory, attempt, row["train/step"], samples)
        # `farspan wandb sync` may have taken some since the row before.
        taken = int(os.pread(self._numbers, STEP_DIGITS, 0) or 0)
        number = max(self._next, taken)
        self._next = number + 1
        # In one write: a number is never half there.
        os.pwrite(self._numbers, f"{self._next:0{STEP_DIGITS}d}".encode(), 0)
        values = scalars(row) | histograms(row)
        self._run.log(values | table_of(samples), step=number, commit=True)

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title, text, "WARN")

    def finish(self) -> None:
        self._run.finish()
        os.close(self._numbers)


def _start(run: RunDirectory, config: Config, mode: Mode) -> Any:
    if mode == "online":
        try:
            if has_key():
                return start_wandb(run, config, "online")
            why = "there is no API key (WANDB_API_KEY, or `wandb login`)"
        except Exception as error:
            _tear_down()
            why = f"{type(error).__name__}: {error}"
        _tell(f"wandb.mode=online, but {why}; it goes on offline")
    return start_wandb(run, config, "offline")


def has_key() -> bool:
    """Whether this account may talk to the W&B server of the environment, as far as it knows."""
    import wandb
    from wandb.sdk.lib import wbauth

    # Or it says where it has found the key.
    host = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    return wbauth.authenticate_session(host=host, source="farspan", prompt=False) is not None


def start_wandb(
    run: RunDirectory, config: Config, mode: Mode, folder: Path | None = None, **settings: Any
) -> Any:
    """Begin, or go on with, the W&B run of a run directory.

    Args:
        folder: where W&B keeps its files, the run directory if none is given.
        settings: more of `wandb.Settings`.
    """
    if mode == "offline":
        # W&B's reports of its own errors would go over the network.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb

    run.wandb.mkdir(parents=True, exist_ok=True)
    wandb_run = wandb.init(
        dir=folder or run.root,
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=run.root.name,
        id=wandb_id(run.wandb_id),
        mode=mode,
        resume="allow" if mode == "online" else None,
        config=described(run, config),
        save_code=False,
        allow_val_change=True,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            # The command line, the environment and git remotes may hold credentials.
            x_disable_meta=True,
            disable_git=True,
            **settings,
        ),
    )
    wandb_run.define_metric("train/step")
    wandb_run.define_metric("*", step_metric="train/step")
    return wandb_run


def described(run: RunDirectory, config: Config) -> dict[str, Any]:
    """What W&B shows of a run: its configuration, and where code, data and layout came from."""
    attempt = run.current_attempt()
    versions, data = _read(run.versions, {}), _read(run.data, [])
    about = {
        "attempt": attempt,
        **_read(run.ranks_of(attempt), {}),
        "git": versions.get("git"),
        "versions": versions,
        "data": [{name: source[name] for name in OF_DATA if name in source} for source in data],
    }
    settings: dict[str, Any] = all_without_credentials(config.model_dump(mode="json"))
    return settings | {"farspan": about}


def _read(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else missing


def wandb_id(path: Path) -> str:
    """The id that a run directory has at W&B, made at its first use."""
    if not path.exists():
        write_atomically(path, secrets.token_hex(4))
    return path.read_text()


def _tear_down() -> None:
    """End W&B's service now, or its hook at exit would fail again, with a traceback."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _tell(what: str) -> None:
    with suppress(OSError):
        print(f"wandb: {what}; `farspan wandb sync RUN` sends the rest", file=sys.stderr)
