"""`farspan wandb sync`: sends W&B what it does not have of a run, and verifies that it arrived.

`wandb sync` of a list of fragments uploads none of them, and exits with 0, if one was torn by a
kill. So each is sent by itself, then W&B is asked for its rows, and those of metrics.jsonl that it
does not have are sent from there.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from launch.run_state import read_state
from launch.slurm.client import SlurmError
from launch.starters import slurm_here
from launch.wandb_rows import MirroredRow, mirrored_rows
from pretrain.config import Config, read_run_config
from pretrain.errors import TrainingError, UserError
from pretrain.metrics.samples import NAME as SAMPLES
from pretrain.metrics.samples import Sample
from pretrain.metrics.sinks import last_step, to_json
from pretrain.metrics.wandb_sink import Mirror, has_key, scalars, start_wandb, wandb_id
from pretrain.run_dir import RunDirectory

ANSWER_TIMEOUT_S = 20
FIRST_POLL_S, LONGEST_POLL_S = 0.5, 8.0
FRAGMENT_TIMEOUT_S = 3600.0
NAMED_AT_MOST = 8
# W&B's own retries last for hours.
RETRIES = {"GRAPHQL": 4, "FILE_STREAM": 4, "FILE_TRANSFER": 4}
# States in which rank 0 may be adding to the newest fragment.
WRITING = ("running", "cancelling", "ending")


@dataclass(frozen=True)
class Arrival:
    """How metrics.jsonl and W&B differ.

    Attributes:
        rows: of metrics.jsonl.
        missing: the steps whose row W&B has not, or not as it is, and the names of what it lacks of
            it; None: all.
        undone: steps that W&B has and metrics.jsonl has not: a rollback or a kill undid them.
    """

    rows: int
    missing: Mapping[int, frozenset[str] | None]
    undone: int


@dataclass(frozen=True)
class Stored:
    """What W&B has, of some steps the values: not of those that are as they should be.

    Attributes:
        whole: steps of which it has a row with all that it should have.
        since: of the other rows, or those that came after that one, by name the value that came
            last; no values of a step that it should not have.
    """

    whole: set[int]
    since: dict[int, dict[str, Any]]

    @property
    def steps(self) -> set[int]:
        return self.whole | self.since.keys()

    def shown(self, row: MirroredRow) -> dict[str, Any] | None:
        """What W&B shows of the step of a row that it should have; None: it has no such step."""
        before = as_mirrored(row) if row.step in self.whole else None
        since = self.since.get(row.step)
        return before if since is None else (before or {}) | since


class WandbHistory:
    """The rows that a W&B server has of a run.

    Raises: UserError, there is no key; TrainingError, the server does not answer.
    """

    def __init__(self, config: Config, name: str) -> None:
        api = connect()
        self._owner = f"{config.wandb.entity or api.default_entity}/{config.wandb.project}"
        self._name = name
        self._api = api

    def stored(self, wanted: Mapping[int, int]) -> Stored:
        """What W&B has, in one scan of the whole history.

        Args:
            wanted: the digest of the row that each step should have.
        """
        found = Stored(set(), {})
        for row in self._rows():
            if "train/step" not in row:
                continue
            step = int(row["train/step"])
            if digest(row) == wanted.get(step):
                found.whole.add(step)
                found.since.pop(step, None)
            else:
                found.since.setdefault(step, {}).update(row if step in wanted else {})
        return found

    def attempt(self) -> int | None:
        """The number of the attempt that W&B's configuration of the run is of."""
        run = self._run()
        described: Mapping[str, Any] = run.config.get("farspan", {}) if run else {}
        return described.get("attempt")

    def url(self) -> str:
        import wandb

        return f"{wandb.setup().settings.app_url}/{self._owner}/runs/{self._name}"

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        if run := self._run():
            with self._asking():
                yield from run.scan_history(use_cache=False)

    def _run(self) -> Any:
        """None where W&B does not know it."""
        from wandb.apis.public.runs import RunNotFoundError
        from wandb.errors import CommError

        with self._asking():
            try:
                self._api.flush()
                return self._api.run(f"{self._owner}/{self._name}")
            except CommError as error:
                if isinstance(error.exc, RunNotFoundError):
                    return None
                raise

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from wandb.errors import CommError

        try:
            yield
        except CommError as error:
            raise TrainingError(f"W&B does not say what it has of {self.url()}: {error}") from error


def connect() -> Any:
    """W&B's API with the key of this account.

    Raises:
        UserError: no key.
        TrainingError: no answer.
    """
    import wandb

    if not has_key():
        raise UserError(
            "there is no W&B API key: set WANDB_API_KEY, or run `wandb login`; another server than "
            "W&B's own is named by WANDB_BASE_URL"
        )
    host = wandb.setup().settings.base_url
    check_answers(host)
    try:
        api = wandb.Api(timeout=ANSWER_TIMEOUT_S)
        # The first thing that is asked of the server.
        if not api.default_entity:
            raise UserError("W&B knows no account with this API key: `wandb login --relogin`")
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise TrainingError(f"the W&B server {host} does not let us in: {error}") from error
    return api


def check_answers(host: str) -> None:
    """Make sure that there is a server.

    W&B's client asks for it in a process of its own, which at times does not end if there is none.

    Raises TrainingError: no answer, or none but that something is wrong with the server.
    """
    retries = Retry(3, backoff_factor=0.5, status_forcelist=range(500, 600), allowed_methods=None)
    try:
        with requests.Session() as session:
            session.mount(host, HTTPAdapter(max_retries=retries))
            question = {"query": "query Viewer { viewer { id } }"}
            session.post(f"{host}/graphql", json=question, timeout=ANSWER_TIMEOUT_S)
    except requests.exceptions.SSLError:
        # Which certificates are trusted is a setting of W&B's.
        return
    except requests.RequestException as error:
        raise TrainingError(
            f"the W&B server {host} does not answer; nothing is lost, say it again later: {error}"
        ) from error


def digest(row: Mapping[str, Any]) -> int:
    """Equal for rows with the same scalars, and samples or none, whatever W&B adds to them."""
    mirrored = (
        (name, to_json(value))
        for name, value in row.items()
        if isinstance(value, int | float | str) and not name.startswith("_")
    )
    # W&B names the file of a table in its own way.
    return hash((frozenset(mirrored), SAMPLES in row))


def sync_run(directory: Path, wait_s: float) -> bool:
    """Send what W&B lacks of a run, and print what was sent.

    Args:
        wait_s: how long W&B may take to show what it was sent.

    Returns:
        Whether W&B has each row of metrics.jsonl.

    Raises:
        UserError: no run, no key, or a run that is being trained online.
        TrainingError: the server does not answer.
    """
    run = RunDirectory(directory.resolve())
    config = read_run_config(run)
    if not run.metrics.exists():
        raise UserError(f"{run.root} has no metrics.jsonl yet: nothing was logged")
    os.environ.update({f"WANDB__{name}_RETRY_MAX": str(n) for name, n in RETRIES.items()})
    # Of the command, not of the run that it sends.
    os.environ.pop("WANDB_MODE", None)
    # Or W&B's logs would go to the working directory.
    os.environ["WANDB_DIR"] = str(run.root)
    written = fragment_being_written(run)
    run.wandb.mkdir(exist_ok=True)
    # What a live run logs meanwhile is for the next time.
    last = last_step(run.metrics)
    history = WandbHistory(config, wandb_id(run.wandb_id))
    for fragment in unsent_fragments(run):
        if fragment != written:
            send_fragment(fragment)
    found = compare(run, last, history, wait_s)
    if found.missing:
        steps = steps_text(tuple(found.missing))
        print(f"W&B lacks {len(found.missing)} of {found.rows:,} rows: {steps}")
    # A fragment that is sent late describes the attempt that it is of.
    if found.missing or history.attempt() != run.current_attempt():
        send_rows(run, config, last, found.missing)
        found = compare(run, last, history, wait_s)
    if found.undone:
        print(f"W&B also has {found.undone} steps that were undone by a kill or a rollback")
    if found.missing:
        print(f"still missing, say it again later: {steps_text(tuple(found.missing))}")
        return False
    print(f"all {found.rows:,} rows of metrics.jsonl up to step {last} are at {history.url()}")
    return True


def fragment_being_written(run: RunDirectory) -> Path | None:
    """The file that rank 0 of a run adds to now; it is sent once its attempt is over.

    Raises UserError: W&B gets the rows from rank 0 itself, and two writers would mix them up.
    """
    files = sorted(run.wandb.glob("*run-*/run-*.wandb"), key=lambda file: started(file.parent))
    if not files or _state_of(run) not in WRITING:
        return None
    if not files[-1].parent.name.startswith("offline-"):
        raise UserError(
            f"{run.root} is being trained with wandb.mode=online, and sends its rows itself: sync "
            "it when it has ended or stopped"
        )
    return files[-1]


def _state_of(run: RunDirectory) -> str:
    try:
        return read_state(run, slurm_here()).state
    except SlurmError:
        # Where no Slurm answers, heartbeats tell whether somebody is at work.
        return read_state(run, None).state


def started(folder: Path) -> str:
    """When a W&B folder was made, from its name: offline-run-20261127_120000-ID."""
    return folder.name.rpartition("run-")[2]


def unsent_fragments(run: RunDirectory) -> list[Path]:
    """Files of attempts that were mirrored offline, the oldest first."""
    files = sorted(run.wandb.glob("offline-run-*/run-*.wandb"))
    return [file for file in files if not file.with_name(f"{file.name}.synced").exists()]


def send_fragment(file: Path) -> None:
    """Let W&B's own command send what an attempt has left: rows, alerts, load of the machine."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(file.parent)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=FRAGMENT_TIMEOUT_S,
            check=False,
        )
        is_sent = file.with_name(f"{file.name}.synced").exists()
        why = (done.stdout.strip().splitlines() or ["it says nothing"])[-1]
    except subprocess.TimeoutExpired:
        is_sent, why = False, f"it took more than {FRAGMENT_TIMEOUT_S:.0f} s"
    outcome = "sent" if is_sent else f"not sent as a whole: {why}"
    print(f"{file.parent.name}: {outcome}", flush=True)


def compare(run: RunDirectory, last: int, history: WandbHistory, wait_s: float) -> Arrival:
    """How W&B differs from metrics.jsonl up to a step, once nothing is missing or the wait over."""
    pause, deadline = FIRST_POLL_S, time.monotonic() + wait_s
    while True:
        found = compare_now(run, last, history)
        if not found.missing or time.monotonic() + pause > deadline:
            return found
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL_S)


def compare_now(run: RunDirectory, last: int, history: WandbHistory) -> Arrival:
    wanted = {row.step: digest_of(row) for row in mirrored_rows(run, last)}
    stored = history.stored(wanted)
    differ = wanted.keys() - (stored.whole - stored.since.keys())
    missing: dict[int, frozenset[str] | None] = {}
    for row in mirrored_rows(run, last) if differ else ():
        if row.step in differ:
            shown = stored.shown(row)
            lacks = None if shown is None else lacking(row, shown)
            if lacks is None or lacks:
                missing[row.step] = lacks
    return Arrival(len(wanted), missing, len(stored.steps - wanted.keys()))


def lacking(row: MirroredRow, shown: Mapping[str, Any]) -> frozenset[str]:
    """What W&B does not show of a row, or shows with another value."""
    numbers = scalars(row.values).items()
    lacks = {name for name, value in numbers if to_json(value) != to_json(shown.get(name))}
    lacks |= {SAMPLES} if row.samples and SAMPLES not in shown else set()
    return frozenset(lacks)


def digest_of(row: MirroredRow) -> int:
    return digest(as_mirrored(row))


def as_mirrored(row: MirroredRow) -> dict[str, Any]:
    """What W&B should show of a row, without its samples themselves."""
    return scalars(row.values) | dict.fromkeys([SAMPLES] * bool(row.samples))


def send_rows(
    run: RunDirectory, config: Config, last: int, missing: Mapping[int, frozenset[str] | None]
) -> None:
    """Send what is missing, and the description of the run as it is now.

    Of a row that W&B has in part, that part is not sent again: it would be shown twice.

    Raises TrainingError: W&B does not let the run go on.
    """
    import wandb

    try:
        # In the run directory, its files would pass for those of a rank that is online.
        with tempfile.TemporaryDirectory() as folder:
            wandb_run = start_wandb(run, config, "online", Path(folder), x_disable_stats=True)
            mirror = Mirror(run, wandb_run)
            for row in mirrored_rows(run, last) if missing else ():
                if row.step in missing:
                    mirror.log(*part_of(row, missing[row.step]))
            mirror.finish()
    except (wandb.errors.Error, OSError) as error:
        raise TrainingError(f"W&B does not take rows: {error}") from error


def part_of(
    row: MirroredRow, names: frozenset[str] | None
) -> tuple[Mapping[str, Any], Sequence[Sample]]:
    """Those numbers of a row, and its samples if they are named; all of it if nothing is."""
    if names is None:
        return row.values, row.samples
    numbers = {name: value for name, value in scalars(row.values).items() if name in names}
    return {"train/step": row.step, **numbers}, row.samples if SAMPLES in names else ()


def steps_text(steps: tuple[int, ...]) -> str:
    """As in `steps 3-5, 9`."""
    ends = [number for number, (a, b) in enumerate(pairwise(steps), start=1) if b != a + 1]
    spans = [steps[a:b] for a, b in pairwise([0, *ends, len(steps)])]
    named = [f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
    more = f" and {len(named) - NAMED_AT_MOST} more spans" if len(named) > NAMED_AT_MOST else ""
    return f"steps {', '.join(named[:NAMED_AT_MOST])}{more}"
