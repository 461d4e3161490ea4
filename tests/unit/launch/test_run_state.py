"""Where runs are, from their directories and from what Slurm's commands print."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cancel as cancelling
from launch.cancel import cancel
from launch.cancelled import mark_cancelled
from launch.causes import Cause
from launch.failures import note_failure
from launch.run_state import RunState, read_state
from launch.slurm.excludes import exclude
from launch.slurm.job import Job, write_job
from launch.slurm.profile import Profile
from launch.slurm.start import Start
from launch.starters import launcher_of, slurm_here
from launch.status import print_status
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from tests.unit.launch.fake_slurm import FakeSlurm

HOST = socket.gethostname()
# Holds the right to start attempts, and ends when it is told to.
LAUNCHER = """
import signal, sys
from pathlib import Path
from pretrain.run_dir import RunDirectory
with RunDirectory(Path(sys.argv[1])).launching():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("holds", flush=True)
    signal.pause()
"""

DEAF = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print(flush=True)
signal.pause()
"""


def make_run(folder: Path) -> RunDirectory:
    folder.mkdir(parents=True)
    run = RunDirectory(folder)
    run.config.write_text(load_config("tiny", ["train.steps=400"]).to_yaml())
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path / "runs" / "run")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.path), prepend=os.pathsep)
    return fake


@pytest.fixture
def launcher(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def train(run: RunDirectory, steps: range) -> int:
    """An attempt that has logged these steps, each of 2 s and 1000 tokens/s."""
    attempt = run.begin_attempt()
    with run.metrics.open("a") as metrics:
        for step in steps:
            # As long as that of a large model: its load of experts.
            row = {"train/step": step, "perf/tokens_per_s": 1e3, "perf/step_s": 2.0}
            metrics.write(json.dumps(row | {"moe/load": [0.5] * 9000}) + "\n")
    return attempt


def submit(run: RunDirectory, *numbers: str) -> None:
    job = Job(
        recipe="tiny",
        name="farspan",
        nodes=2,
        ranks_per_node=1,
        profile_name="generic",
        profile=Profile(),
        python=sys.executable,
    )
    for number in numbers:
        job = job.submitted(number, "submitted")
    write_job(run, job)


def state_of(run: RunDirectory) -> RunState:
    return read_state(run, slurm_here())


def test_a_run_before_its_first_attempt_is_prepared(run: RunDirectory) -> None:
    state = read_state(run, None)
    assert (state.state, state.attempt, state.step, state.steps) == ("prepared", 0, 0, 400)
    assert (state.tokens_per_s, state.checkpoint, state.eta_s) == (None, None, None)


def test_a_run_that_trains_tells_how_fast_and_how_long(
    run: RunDirectory, launcher: subprocess.Popen[str]
) -> None:
    attempt = train(run, range(1, 101))
    run.mark_saved(90, attempt, "somewhere")
    state = read_state(run, None)
    assert (state.state, state.where) == ("running", f"process {launcher.pid} on {HOST}")
    assert (state.attempt, state.step, state.checkpoint) == (1, 100, 90)
    assert (state.tokens_per_s, state.eta_s) == (1000, 300 * 8 * 256 / 1000)
    assert state.checkpoint_age_s is not None
    # It was started again with fewer steps than it has had.
    run.config.write_text(load_config("tiny", ["train.steps=50"]).to_yaml())
    assert read_state(run, None).eta_s == 0
    launcher.kill()
    launcher.wait()
    # The file says still who held it.
    assert str(launcher_of(run)) == f"process {launcher.pid} on {HOST}"
    assert read_state(run, None).state == "lost"


def test_a_number_that_another_process_has_now_is_not_the_launcher(run: RunDirectory) -> None:
    run.launcher_lock.write_text(f"process {os.getpid()} on {HOST}\n")
    found = launcher_of(run)
    assert found
    assert found.is_alive is False
    run.launcher_lock.write_text("process 1 on elsewhere\n")
    found = launcher_of(run)
    assert found
    assert found.is_alive is None


def test_how_a_run_has_ended(run: RunDirectory) -> None:
    attempt = train(run, range(1, 11))
    assert read_state(run, None).state == "lost"
    beats = run.folder_of(attempt) / "heartbeats.json"
    beats.write_text("[]")
    # On a machine that this one cannot look into.
    assert read_state(run, None).state == "running"
    os.utime(beats, (0, 0))
    state = read_state(run, None)
    assert (state.state, state.detail.partition(" ")[0]) == ("lost", "last")
    note_failure(run, attempt, "7", Cause("lost rank", 3, "node-17", "rank 3 is dead"))
    state = read_state(run, None)
    assert (state.state, state.detail) == ("failed", "on node-17: rank 3 is dead")
    assert [failure.step for failure in state.failures] == [10]
    attempt = train(run, range(11, 21))
    run.mark_stopped(20, attempt, "asked to stop by SIGUSR2")
    state = read_state(run, None)
    assert (state.state, state.detail) == ("stopped", "asked to stop by SIGUSR2")
    mark_cancelled(run, "me on here", [])
    state = read_state(run, None)
    assert (state.state, state.detail) == ("cancelled", "by me on here")
    run.mark_done(20, attempt)
    assert read_state(run, None).state == "done"


@pytest.mark.parametrize(
    ("in_slurm", "expected"),
    [
        (
            {"state": "PENDING", "reason": "Resources", "start": "2026-11-28T09:30:00"},
            ("queued", "Resources, starts 2026-11-28 09:30 at the latest", "job 12"),
        ),
        ({"state": "RUNNING"}, ("running", "", "job 12 on node1, node2")),
        ({"state": "COMPLETING"}, ("ending", "", "job 12")),
        ({"state": "SUSPENDED"}, ("queued", "Slurm says SUSPENDED", "job 12")),
        ({"state": "FAILED"}, ("prepared", "job 12 has ended before one: FAILED", "")),
        (
            {"state": "CANCELLED", "reason": "DependencyNeverSatisfied"},
            ("prepared", "job 12 has ended before one: CANCELLED, DependencyNeverSatisfied", ""),
        ),
        (
            {"state": "CANCELLED", "reason": "Priority"},
            ("prepared", "job 12 has ended before one: CANCELLED", ""),
        ),
    ],
)
def test_the_newest_job_of_a_run_says_where_it_is(
    run: RunDirectory, slurm: FakeSlurm, in_slurm: dict[str, str], expected: tuple[str, str, str]
) -> None:
    # Slurm has forgotten the first one.
    submit(run, "9", "12")
    slurm.add("12", **in_slurm)
    state = state_of(run)
    assert (state.state, state.detail, state.where) == expected


def test_a_job_submitted_by_hand_is_known_by_its_attempt(
    run: RunDirectory, slurm: FakeSlurm
) -> None:
    attempt = train(run, range(1, 3))
    Start("31", 0, "main", ("node1",), (1,), "2026-11-27T10:00:00").note(run, attempt)
    slurm.add("31", "RUNNING")
    assert state_of(run).where == "job 31 on node1, node2"


def test_a_cancel_holds_for_the_jobs_that_it_ended(run: RunDirectory, slurm: FakeSlurm) -> None:
    submit(run, "12")
    slurm.add("12", "RUNNING")
    cancel(run, at_once=True)
    assert state_of(run).state == "cancelled"
    attempt = train(run, range(1, 3))
    Start("31", 0, "main", ("node1",), (1,), "2026-11-27T10:00:00").note(run, attempt)
    submit(run, "31")
    slurm.add("31", "RUNNING")
    assert state_of(run).state == "running"
    run.mark_stopped(2, attempt, "asked to stop by SIGUSR2")
    slurm.add("31", "FAILED")
    assert state_of(run).state == "stopped"


def test_one_run_is_told_of_with_its_failures_and_excluded_nodes(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt, step in ((1, 4), (2, 1004)):
        train(run, range(step, step + 1))
        note_failure(run, attempt, "7", Cause("error", 3, "node-17", f"[red]Error {step}"))
    exclude(run, "node-17", "attempt 2: Bus error", 3600)
    print_status([run.root], watch=False, as_json=False)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "state     failed" in lines
    assert "step      1,004 of 400" in lines
    assert any(
        line.startswith("excluded  node-17 until ") and line.endswith(": attempt 2: Bus error")
        for line in lines
    )
    assert lines[-1].split(maxsplit=3)[:2] == ["2", "1,004"]
    assert lines[-1].endswith("rank 3 on node-17: [red]Error 1004")
    print_status([run.root], watch=False, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["run"], told["state"], told["step"]) == (str(run.root), "failed", 1004)
    assert [failure["error"] for failure in told["failures"]] == ["[red]Error 4", "[red]Error 1004"]
    assert told["excluded"][0]["node"] == "node-17"


def test_without_names_runs_under_runs_and_of_jobs_are_found(
    run: RunDirectory,
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = make_run(tmp_path / "elsewhere")
    submit(elsewhere, "12")
    slurm.add("12", "PENDING", "Priority")
    slurm.work_in(elsewhere.root, tmp_path, tmp_path / "no such")
    print_status([], watch=False, as_json=False)
    _, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first[:2] == ["runs/run", "prepared"]
    assert (second[:2], second[-3:]) == (["elsewhere", "queued"], ["Priority;", "job", "12"])
    monkeypatch.chdir(run.root)
    slurm.work_in()
    with pytest.raises(UserError, match=r"no runs under .*, and no jobs of yours"):
        print_status([], watch=False, as_json=False)


def test_a_folder_that_is_no_run_of_ours_does_not_hide_the_others(
    run: RunDirectory,
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(run, range(1, 4))
    run.mark_done(400, 1)
    for name, content in {"hydra": "lr: 1", "tagged": "!!python/tuple [1]"}.items():
        (run.root.parent / name).mkdir()
        (run.root.parent / name / "config.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    for watch in (False, True):
        print_status([], watch=watch, as_json=False)
        told = capsys.readouterr()
        assert "done" in told.out
        for name, why in {"hydra": "lr is not a setting", "tagged": "could not determine"}.items():
            config = run.root.parent / name / "config.yaml"
            assert f"warning: runs/{name} is left out: {config}: {why}" in told.err
    with pytest.raises(UserError, match="lr is not a setting"):
        print_status([run.root.parent / "hydra"], watch=False, as_json=False)
    run.config.unlink()
    with pytest.raises(UserError, match="none of the 2 runs that were found can be read"):
        print_status([], watch=False, as_json=False)


def test_a_job_that_waits_gets_nodes_back_whose_time_is_over(
    run: RunDirectory, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """And none else: not what its owner excludes, not what is broken still."""
    submit(run, "12")
    exclude(run, "n1", "it was broken", -1)
    exclude(run, "n2", "it is broken", 3600)

    def excluded() -> tuple[str, ...]:
        here = slurm_here()
        job = here.job("12") if here else None
        return job.excluded if job else ()

    slurm.add("12", "RUNNING", excluded="mine,n1,n2")
    print_status([run.root], watch=False, as_json=False)
    assert excluded() == ("mine", "n1", "n2")
    slurm.add("12", "PENDING", excluded="mine,n1,n2")
    print_status([run.root], watch=False, as_json=False)
    assert excluded() == ("mine", "n2")
    assert capsys.readouterr().err == "job 12 may run on n1 again\n"
    print_status([run.root], watch=False, as_json=False)
    assert capsys.readouterr().err == ""


def test_where_slurm_does_not_answer_the_run_directory_has_to(
    run: RunDirectory, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(run, "12")
    (slurm.path / "scontrol").write_text("#!/bin/bash\necho no such cluster >&2; exit 1\n")
    for watch in (False, True):
        print_status([run.root], watch=watch, as_json=False)
        told = capsys.readouterr()
        assert told.err.count("warning: Slurm does not answer (scontrol: no such cluster") == 1
        assert "prepared" in told.out


def test_watching_ends_with_the_run_and_prints_what_has_changed(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run, range(1, 4))
    run.mark_done(400, 1)
    print_status([run.root], watch=True, as_json=False)
    assert capsys.readouterr().out.split()[1:] == ["done", "attempt", "1", "step", "3", "of", "400"]


def test_a_process_is_cancelled_and_the_run_not_started_again(
    run: RunDirectory, launcher: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = train(run, range(1, 4))
    run.mark_saved(2, attempt, "somewhere")
    cancel(run, at_once=False)
    assert launcher.wait() == 75
    assert "the newest checkpoint is that of step 2" in capsys.readouterr().out
    assert json.loads(run.cancelled.read_text())["by"].endswith(HOST)
    assert read_state(run, None).state == "cancelled"
    cancel(run, at_once=False)
    assert f"nothing of {run.root} runs: it is cancelled" in capsys.readouterr().out


def test_a_process_that_does_not_stop_is_killed_with_its_ranks(
    run: RunDirectory, launcher: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "SAVE_S", 0.5)
    monkeypatch.setattr(cancelling, "END_S", 2.0)
    attempt = train(run, range(1, 4))
    ignores = (
        "import signal; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(flush=True)"
    )
    deaf = [sys.executable, "-c", f"{ignores}; signal.pause()", str(run.root)]
    with subprocess.Popen(deaf, stdout=subprocess.PIPE) as rank:
        assert rank.stdout
        rank.stdout.readline()
        # A number that is another process's by now is left alone.
        pids = [rank.pid, os.getpid()]
        (run.folder_of(attempt) / "pids.json").write_text(json.dumps(pids))
        launcher.send_signal(19)
        cancel(run, at_once=False)
        assert (rank.wait(), launcher.wait()) == (-9, -9)


def test_jobs_are_cancelled_those_that_run_after_they_have_saved(
    run: RunDirectory, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "POLL_OF_SLURM_S", 0.01)
    submit(run, "12")
    slurm.add("12", "PENDING")
    cancel(run, at_once=False)
    assert slurm.cancelled() == ["12"]
    assert run.cancelled.exists()
    slurm.add("12", "RUNNING")
    cancel(run, at_once=False)
    slurm.add("12", "RUNNING")
    cancel(run, at_once=True)
    assert slurm.cancelled() == ["12", "--signal=USR2 12", "--signal=HUP 12", "12"]


def test_a_run_that_finishes_before_it_is_cancelled_is_done(
    run: RunDirectory, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = train(run, range(1, 4))
    submit(run, "12")
    slurm.add("12", "RUNNING")
    run.mark_done(400, attempt)
    cancel(run, at_once=True)
    assert "resubmit" not in (told := capsys.readouterr().out)
    assert told.endswith(f"{run.root} has finished its last step meanwhile: it is done\n")


def test_what_another_machine_trains_is_to_be_cancelled_there(run: RunDirectory) -> None:
    attempt = train(run, range(1, 4))
    (run.folder_of(attempt) / "heartbeats.json").write_text("[]")
    run.launcher_lock.write_text("process 12 on node-17\n")
    with pytest.raises(UserError, match="is trained by process 12 on node-17, and nothing of that"):
        cancel(run, at_once=False)
    assert not run.cancelled.exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for command in (lambda: read_state(run, None), lambda: cancel(run, at_once=True)):
        with pytest.raises(UserError, match="is not a run directory"):
            command()
