"""Where a data run is: from what lies in its folder, and what Slurm says of its jobs."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.slurm.client import JobInfo, Slurm
from launch.slurm.data import failures_of, unfinished_parts
from launch.slurm.data_job import DataJob, JobFolder, Stage

if TYPE_CHECKING:
    from data_pipeline.parts import State

# stopped: nobody is at work; the command that made the folder goes on with what is finished.
DataRunState = Literal["prepared", "queued", "running", "ending", "stopped", "failed", "done"]
LIVE: Sequence[DataRunState] = ("queued", "running", "ending")
# A process at work is heard of every 10 s.
FRESH_S = 60.0
# A file system on the network answers many at a time.
READERS = 16


@dataclass(frozen=True)
class DataState:
    """
    Attributes:
        out: the folder of the run.
        detail: why it is in that state, if there is more to say.
        where: the jobs or processes that are at work.
        stage: the one it is at: clean, dedup, shards, finish or "" where all is done.
        parts: of the stage, under Slurm: how many are done, running, queued, failed or open.
        cleaned: of the archives; written: of the shards, whose number is None before it is known.
        documents: of the archives that are cleaned, each one once.
        documents_per_s: of the processes at work, and in MB of what they read.
        eta_s: until the stage is done, if those at work do all that is left of it.
        failures: jobs that have failed, and why.
    """

    out: Path
    state: DataRunState
    detail: str
    where: str
    stage: str
    parts: dict[str, int]
    archives: int
    cleaned: int
    shards: int | None
    written: int | None
    documents: int
    documents_per_s: float | None
    mb_per_s: float | None
    eta_s: float | None
    failures: tuple[str, ...]

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    def to_json(self) -> dict[str, Any]:
        return {"run": str(self.out), "kind": "data"} | {
            name: value for name, value in asdict(self).items() if name != "out"
        }


def is_data_run(folder: Path) -> bool:
    """Whether a folder is one of `farspan data run`, under Slurm or not."""
    return JobFolder(folder).job.is_file() or {"inputs", "recipe"} <= _plan(folder).keys()


def read_data_state(out: Path, slurm: Slurm | None) -> DataState:
    """
    Args:
        slurm: None on a machine without; jobs are then known by what they write alone.

    Raises:
        UserError: the parameters of its jobs cannot be read.
        SlurmError: Slurm does not answer.
    """
    from data_pipeline.parts import state_of

    folder = JobFolder(out)
    job = folder.read()
    jobs = _jobs(folder, job, slurm)
    files = state_of(out, len(_plan(out).get("inputs", ())))
    stage = _stage(files)
    rows = _rows_at_work(out)
    failures = tuple(failures_of(folder, job, jobs))
    state, detail, where = _state(out, files, jobs, rows, failures)
    at_stage = [row for row in rows if row["data/stage"] == stage and state in LIVE]
    # Its last process may still be removing what it is made of.
    is_ended = (out / "manifest.json").exists()
    shards = _shards(out, files, is_ended)
    return DataState(
        out=out,
        state=state,
        detail=detail,
        where=where,
        stage=stage,
        parts=_parts(folder, job, jobs, files, stage),
        archives=len(files.cleaned),
        cleaned=sum(files.cleaned),
        shards=shards,
        written=shards if is_ended else sum(files.written or ()),
        documents=_documents(out, is_ended),
        documents_per_s=_sum_of(at_stage, "data/documents_per_s"),
        mb_per_s=_sum_of(at_stage, "data/mb_in_per_s"),
        eta_s=_eta_s(at_stage, files, stage),
        failures=failures,
    )


def _plan(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        return plan
    return {}


def _jobs(folder: JobFolder, job: DataJob | None, slurm: Slurm | None) -> list[JobInfo]:
    """The jobs of the last time that Slurm knows of."""
    if slurm is None or job is None:
        return []
    names = {folder.job_name(stage) for stage in Stage}
    # Numbers come again: the job of that number may be another one by now.
    return [info for info in slurm.jobs(one.job for one in job.submissions) if info.name in names]


def _stage(files: "State") -> str:
    """What is to be done next."""
    if files.is_finished:
        return ""
    if not files.cleaned or not all(files.cleaned):
        return Stage.clean.value
    if files.written is None:
        return Stage.dedup.value
    return Stage.finish.value if all(files.written) else Stage.shards.value


def _rows_at_work(out: Path) -> list[dict[str, Any]]:
    """The newest row of each process that is at work, on whichever machine."""
    from data_pipeline.rates import RATES, read_attempts

    return [
        row for row, _ in read_attempts(out / "work" / RATES, FRESH_S) if not row["data/finished"]
    ]


def _state(
    out: Path,
    files: "State",
    jobs: Sequence[JobInfo],
    rows: Sequence[dict[str, Any]],
    failures: Sequence[str],
) -> tuple[DataRunState, str, str]:
    """The state, why, and where the run is."""
    if live := [info for info in jobs if not info.is_over]:
        return _state_of_jobs(live)
    if files.is_finished:
        return "done", "", ""
    where = ", ".join(sorted({row["data/attempt"] for row in rows}))
    if _is_held(out):
        return "running", "", where
    if failures:  # a process that was killed a moment ago is still heard of
        return "failed", failures[0], ""
    if rows:
        return "running", "", where
    if not (out / "work").exists():
        return "prepared", "", ""
    return "stopped", "the same command goes on with it", ""


def _state_of_jobs(live: Sequence[JobInfo]) -> tuple[DataRunState, str, str]:
    at_work = [info for info in live if info.state == "RUNNING"]
    listed = dict.fromkeys(info.array or info.id for info in at_work or live)
    where = f"job{'s' if len(listed) > 1 else ''} {', '.join(listed)}"
    if at_work:
        nodes = sorted({node for info in at_work for node in info.nodes})
        return "running", "", where + (f" on {', '.join(nodes)}" if nodes else "")
    if all(info.state == "COMPLETING" for info in live):
        return "ending", "", where
    return "queued", live[0].reason, where


def _is_held(out: Path) -> bool:
    from data_pipeline.shards.store import LocalStore

    return bool(LocalStore(out).has_writer())


def _parts(
    folder: JobFolder, job: DataJob | None, jobs: Sequence[JobInfo], files: "State", stage: str
) -> dict[str, int]:
    """How many parts of the stage are in which state."""
    if job is None or not stage or not Stage(stage).is_parted:
        return {}
    items = files.cleaned if stage == Stage.clean else files.written or ()
    left = set(unfinished_parts(items, job.tasks)) if items else set(range(1, job.tasks + 1))
    states = {info.task: info for info in jobs if info.name == folder.job_name(Stage(stage))}
    counts = Counter(_state_of_part(states.get(part, states.get(None))) for part in left)
    counts["done"] = job.tasks - len(left)
    return {
        name: counts[name]
        for name in ("done", "running", "queued", "failed", "open")
        if counts[name]
    }


def _state_of_part(info: JobInfo | None) -> str:
    """Of one that is not done; those that wait may be one job still."""
    if info is None:
        return "open"
    if info.is_over:
        return "open" if info.state == "COMPLETED" else "failed"
    return "running" if info.state in ("RUNNING", "COMPLETING") else "queued"


def _sum_of(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) if values else None


def _eta_s(rows: Sequence[dict[str, Any]], files: "State", stage: str) -> float | None:
    """If those at work do all that is left of the stage at the speed that they have had."""
    items = files.cleaned if stage == Stage.clean else files.written or ()
    at_work = [row for row in rows if row.get("data/share") and row["data/wall_s"]]
    speed = sum(row["data/items"] * row["data/share"] / row["data/wall_s"] for row in at_work)
    left = float(items.count(False))
    if left <= sum(row["data/items"] for row in at_work):
        # All of it is at work, and some of it done: an item is there only once it is whole.
        left = min(left, sum(row["data/items"] * (1 - row["data/share"]) for row in at_work))
    return left / speed if speed else None


def _shards(out: Path, files: "State", is_ended: bool) -> int | None:
    if is_ended:
        return len(_manifest(out)["shards"])
    return None if files.written is None else len(files.written)


def _documents(out: Path, is_ended: bool) -> int:
    if is_ended:
        return sum(row["documents"] for row in _manifest(out)["extra"].get("funnel", ()))
    with suppress(FileNotFoundError), ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(_documents_of, (out / "work" / "pieces").glob("[0-9]*/archive.json")))
    return 0  # removed since


def _documents_of(summary: Path) -> int:
    with suppress(OSError, ValueError):
        return _read_documents(summary)
    return 0


@cache  # a finished piece stays what it is
def _read_documents(summary: Path) -> int:
    return int(json.loads(summary.read_text())["documents"])


def _manifest(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest
