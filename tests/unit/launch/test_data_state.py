"""Where data runs are, from their folders and from what Slurm's commands print."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.run_folder import exclusive
from launch.data_run import DataRun
from launch.data_state import DataState, read_data_state
from launch.slurm.data_job import DataJob, JobFolder, Stage
from launch.slurm.profile import Profile
from launch.starters import slurm_here
from launch.status import print_status
from pretrain.errors import UserError
from tests.unit.launch.fake_slurm import FakeSlurm

ARCHIVES, TASKS = 8, 4
RUN = DataRun(("crawl",), "demo", None, None, None, None, 600, "WARC-Record-ID", "", None)
JOB = """\
JobId={id} JobName={name}{task}
   JobState={state} Reason={reason} Dependency=(null)
   Restarts=0 ExitCode=9:0
   NodeList={nodes}
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of eight archives, of which two are cleaned."""
    folder = tmp_path / "runs" / "crawl"
    folder.mkdir(parents=True)
    inputs = {f"{number}.warc": "?" for number in range(ARCHIVES)}
    (folder / "plan.json").write_text(json.dumps({"inputs": inputs, "recipe": {}}))
    for number in (0, 4):
        piece = folder / "work" / "pieces" / f"{number:05d}"
        piece.mkdir(parents=True)
        (piece / "archive.json").write_text(json.dumps({"documents": 100 + number}))
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.path), prepend=os.pathsep)
    return fake


def work(out: Path, name: str, age_s: float = 0.0, **row: Any) -> None:
    """Leave what a process writes that cleans."""
    fixed = {"stage": "clean", "attempt": f"process 7 on {name}", "finished": 0, "items": 2}
    speed = {"documents_per_s": 30.0, "mb_in_per_s": 1.5}
    told = {f"data/{key}": value for key, value in (fixed | speed | row).items()}
    path = out / "work" / "rates" / f"clean-{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told) + "\n")
    os.utime(path, (time.time() - age_s,) * 2)


def submit(out: Path, **jobs: str) -> JobFolder:
    """Let a command have submitted these jobs, by their stages."""
    folder = JobFolder(out)
    job = DataJob(RUN, str(out), TASKS, "generic", Profile(), "python")
    for stage, number in jobs.items():
        parts = tuple(range(1, TASKS + 1)) if Stage(stage).is_parted else None
        job = job.submitted(Stage(stage), number, parts)
    folder.write(job)
    return folder


def know(slurm: FakeSlurm, folder: JobFolder, stage: Stage, number: str, *tasks: str) -> None:
    """Let Slurm know a job: TASK:STATE of an array, or its STATE."""
    records = []
    for told in tasks:
        task, _, state = told.rpartition(":")
        nodes = f"node{task}" if state == "RUNNING" else "(null)"
        reason = "Priority" if state == "PENDING" else "None"
        array = f"\n   ArrayJobId={number} ArrayTaskId={task}" if task else ""
        name = folder.job_name(stage)
        records.append(
            JOB.format(
                id=number,
                name=name,
                task=array,
                state=state,
                reason=reason,
                nodes=nodes,
            )
        )
    (slurm.path.parent / "jobs" / number).write_text("\n".join(records))


def state_of(out: Path) -> DataState:
    return read_data_state(out, slurm_here())


def test_processes_anywhere_are_known_by_what_they_write(out: Path) -> None:
    work(out, "login", share=0.5, wall_s=100.0)
    work(out, "node1", share=0.25, wall_s=100.0)
    work(out, "killed", age_s=3600, share=0.9, wall_s=10.0)
    work(out, "ended", finished=1, share=1.0, wall_s=10.0)
    state = read_data_state(out, None)
    assert (state.state, state.stage, state.is_live) == ("running", "clean", True)
    assert state.where == "process 7 on login, process 7 on node1"
    assert (state.cleaned, state.archives, state.documents) == (2, ARCHIVES, 204)
    assert (state.documents_per_s, state.mb_per_s) == (60.0, 3.0)
    # Two archives of each: 1.5 in 100 s, and six are left.
    assert state.eta_s == pytest.approx(400)


def test_of_the_last_archive_only_the_rest_is_waited_for(out: Path) -> None:
    pieces = out / "work" / "pieces"
    for number in {*range(ARCHIVES)} - {0, 4, 7}:
        (pieces / f"{number:05d}").mkdir()
    work(out, "node1", items=1, share=0.9, wall_s=90.0)
    assert read_data_state(out, None).eta_s == pytest.approx(10)


def test_a_summary_that_could_not_be_read_once_is_read_again(out: Path) -> None:
    summary = out / "work" / "pieces" / "00004" / "archive.json"
    content = summary.read_bytes()
    summary.write_bytes(content[:3])
    assert read_data_state(out, None).documents == 100
    summary.write_bytes(content)
    assert read_data_state(out, None).documents == 204


def test_a_run_at_which_nobody_works_has_stopped_and_one_that_is_held_has_not(out: Path) -> None:
    work(out, "killed", age_s=3600, share=0.9, wall_s=10.0)
    state = read_data_state(out, None)
    assert (state.state, state.documents_per_s, state.eta_s) == ("stopped", None, None)
    with exclusive(out):
        assert read_data_state(out, None).state == "running"


def test_jobs_are_told_by_their_parts(out: Path, slurm: FakeSlurm) -> None:
    folder = submit(out, clean="41", dedup="42")
    know(slurm, folder, Stage.clean, "41", "2:RUNNING", "3:FAILED", "4:PENDING")
    know(slurm, folder, Stage.dedup, "42", "PENDING")
    state = state_of(out)
    # Part 1 has the archives 0 and 4, which are there.
    assert state.parts == {"done": 1, "running": 1, "queued": 1, "failed": 1}
    assert (state.state, state.where) == ("running", "job 41 on node2")
    (failure,) = state.failures
    assert failure.startswith("clean part 3 of 4 (job 41_3): FAILED, exit code 9; see ")
    know(slurm, folder, Stage.clean, "41", "2-4:PENDING")
    state = state_of(out)
    assert (state.state, state.detail, state.where) == ("queued", "Priority", "jobs 41, 42")
    assert state.parts == {"done": 1, "queued": 3}
    know(slurm, folder, Stage.clean, "41", "2:COMPLETED", "3:FAILED", "4:COMPLETED")
    know(slurm, folder, Stage.dedup, "42", "CANCELLED")
    work(out, "node3", age_s=5, share=0.5, wall_s=50.0)  # the last word of what was killed
    state = state_of(out)
    assert (state.state, state.is_live, state.documents_per_s) == ("failed", False, None)
    assert state.detail == state.failures[0]


def test_a_job_of_another_folder_with_the_same_number_is_not_ours(
    out: Path, slurm: FakeSlurm, tmp_path: Path
) -> None:
    submit(out, clean="41")
    know(slurm, JobFolder(tmp_path / "other"), Stage.clean, "41", "1:RUNNING")
    assert state_of(out).state == "stopped"


def test_a_run_that_is_only_submitted_is_queued(tmp_path: Path, slurm: FakeSlurm) -> None:
    out = tmp_path / "new"
    folder = submit(out, clean="41")
    know(slurm, folder, Stage.clean, "41", "1-4:PENDING")
    state = state_of(out)
    assert (state.state, state.stage, state.parts) == ("queued", "clean", {"queued": TASKS})
    assert submit(tmp_path / "by-hand")
    assert state_of(tmp_path / "by-hand").state == "prepared"


def test_status_tells_of_data_runs_among_others(
    out: Path,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(out.parents[1])
    folder = submit(out, clean="41")
    know(slurm, folder, Stage.clean, "41", "2:RUNNING", "3-4:PENDING")
    work(out, "node2", share=0.5, wall_s=50.0)
    print_status([], watch=False, as_json=False)
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    facts = {name: fact.strip() for name, fact in told.items()}
    assert facts["parts"] == "1 done, 1 running, 2 queued"
    assert facts["archives"] == "2 of 8 cleaned"
    assert facts["documents"] == "204 in these"
    assert facts["speed"] == "30 documents/s, 1.5 MB/s"
    assert facts["ETA"] == "clean in 5 min"
    print_status([out], watch=False, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["run"], told["kind"], told["parts"]["queued"]) == (str(out), "data", 2)
    know(slurm, folder, Stage.clean, "41", "2:CANCELLED", "3:CANCELLED", "4:CANCELLED")
    work(out, "node2", age_s=600)
    print_status([out], watch=True, as_json=False)
    line = capsys.readouterr().out
    assert line.startswith("runs/crawl  failed  clean  1 done, 3 failed  2 of 8 cleaned")


def test_a_finished_run_says_what_it_has_made(out: Path) -> None:
    funnel = [{"documents": 70}, {"documents": 30}]
    manifest = {"shards": [{}, {}], "extra": {"funnel": funnel}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    state = read_data_state(out, None)  # what it is made of is not removed yet
    assert (state.state, state.stage) == ("stopped", "finish")
    assert (state.cleaned, state.documents, state.written, state.shards) == (ARCHIVES, 100, 2, 2)
    (out / "work").rename(out.parent / "removed")
    state = read_data_state(out, None)
    assert (state.state, state.stage, state.parts) == ("done", "", {})
    assert (state.cleaned, state.documents, state.written, state.shards) == (ARCHIVES, 100, 2, 2)


def test_a_folder_of_neither_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"command": "tokenize"}')
    with pytest.raises(UserError, match=r"config\.yaml"):
        print_status([tmp_path], watch=False, as_json=False)
