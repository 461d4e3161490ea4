"""Which log is shown, and that following it loses and repeats nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.logs import Logs, print_logs
from launch.slurm.start import Start
from launch.tails import BLOCK_BYTES, last_lines
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, TIMEOUT_S
from tests.unit.launch.fake_slurm import FakeSlurm

LINES = [f"line {number}" for number in range(BLOCK_BYTES // 4)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(load_config("tiny").to_yaml())
    return run


def write_log(run: RunDirectory, attempt: int, rank: int, text: str) -> None:
    run.folder_of(attempt).mkdir(parents=True, exist_ok=True)
    with (run.folder_of(attempt) / f"rank-{rank}.log").open("a") as log:
        log.write(text)


@pytest.mark.parametrize("count", [0, 1, 7, len(LINES) - 1, len(LINES), len(LINES) + 1])
def test_the_last_lines_of_a_file_are_those_that_are_complete(tmp_path: Path, count: int) -> None:
    path = tmp_path / "log"
    path.write_text("\n".join(LINES) + "\nhal")
    assert last_lines(path, count) == (LINES[-count:] if count else [])
    path.write_text("no line")
    assert last_lines(path, count) == []


def test_the_newest_attempt_of_a_rank_is_shown_unless_another_is_asked_for(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    write_log(run, 1, 0, "1 of 0\n")
    write_log(run, 1, 1, "1 of 1\n")
    write_log(run, 2, 0, "2 of 0\nand more")
    # A start that failed before it had ranks.
    run.folder_of(3).mkdir()

    def shown(lines: int | None = None, **wanted: int) -> str:
        print_logs(Logs(run, **wanted), lines, follow=False)
        return capfd.readouterr().out

    assert shown() == "2 of 0\nand more"
    assert shown(rank=1) == "1 of 1\n"
    assert shown(attempt=1) == "1 of 0\n"
    assert shown(lines=1) == "2 of 0\nand more"
    assert shown(lines=0) == "and more"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"attempt": 4}, "has no attempt 4, only 1 to 2"),
        ({"rank": 7}, "rank-7.log is not there: in .*0002 there are ranks 0 to 1"),
        ({"of_job": True}, r"no job has printed anything into .* \(slurm-\*.log\)"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(
    run: RunDirectory, wanted: dict, told: str
) -> None:
    with pytest.raises(UserError, match=r"no attempt yet; --follow waits|no job has printed"):
        print_logs(Logs(run, **{"attempt": None, **wanted}), None, follow=False)
    for attempt, rank in ((1, 0), (2, 0), (2, 1)):
        write_log(run, attempt, rank, "\n")
    with pytest.raises(UserError, match=told):
        print_logs(Logs(run, **wanted), None, follow=False)
    if "of_job" in wanted:
        (run.root / "slurm-7.log").write_text("begins\n")
        print_logs(Logs(run, **wanted), None, follow=False)


FOLLOW = """
import sys
from pathlib import Path
import launch.logs
from launch.logs import Logs, print_logs
from pretrain.run_dir import RunDirectory
launch.logs.ASK_S = 0.2
print_logs(Logs(RunDirectory(Path(sys.argv[1]))), None, follow=True)
"""


def test_following_goes_from_attempt_to_attempt_and_ends_with_the_run(run: RunDirectory) -> None:
    command = [sys.executable, "-c", FOLLOW, str(run.root)]
    with run.launching():
        # There is no attempt yet.
        following = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert following.stdout
        for attempt in (1, 2):
            write_log(run, attempt, 0, f"begin {attempt}\n")
            assert following.stdout.readline() == f"begin {attempt}\n"
            write_log(run, attempt, 0, f"more of {attempt}\n")
            assert following.stdout.readline() == f"more of {attempt}\n"
        write_log(run, 2, 0, "end")
    rest, told = following.communicate(timeout=TIMEOUT_S)
    assert (rest, following.returncode) == ("end", 0)
    assert told.splitlines()[-1] == f"==> {run.folder_of(2) / 'rank-0.log'} <=="


def test_following_ends_with_a_run_whose_cluster_this_machine_cannot_ask(
    run: RunDirectory, tmp_path: Path
) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    (slurm.path / "scontrol").write_text("#!/bin/bash\necho no such cluster >&2; exit 1\n")
    write_log(run, 1, 0, "end")
    Start("7", 0, "main", ("node1",), (1,), "2026-11-27T10:00:00").note(run, 1)
    run.done.write_text("{}")
    command = [sys.executable, "-c", FOLLOW, str(run.root)]
    path = {"PATH": f"{slurm.path}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("end", 0), done.stderr
