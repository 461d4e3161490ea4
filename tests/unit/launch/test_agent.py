"""Which failures are followed by another attempt; the ranks are scripts that end as planned."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.agent import run_ranks
from launch.local import STOP_SIGNALS, StopSignals, end_ranks
from pretrain.errors import CANNOT_GO_ON, LOST_RANK, STOPPED_ON_REQUEST
from pretrain.run_dir import RunDirectory

KILLED = -signal.SIGKILL
# In attempt n the run comes to step plan[n][0], and the ranks end with the codes plan[n][1:].
RANK = """
import json, os, sys
step, *codes = json.loads(sys.argv[1])[int(os.environ["FARSPAN_ATTEMPT"]) - 1]
code = codes[int(os.environ["RANK"])]
if os.environ["RANK"] == "0":
    with open(sys.argv[2], "a") as metrics:
        metrics.write(json.dumps({"train/step": step}) + chr(10))
print("attempt", os.environ["FARSPAN_ATTEMPT"], "port", os.environ["MASTER_PORT"], flush=True)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def keep_signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    root = tmp_path / "run"
    root.mkdir()
    return RunDirectory(root)


def run_plan(run: RunDirectory, plan: list[list[int]], max_restarts: int) -> int:
    command = [sys.executable, "-c", RANK, json.dumps(plan), str(run.metrics)]
    with StopSignals() as stop:
        code, attempt = run_ranks(run, command, len(plan[0]) - 1, max_restarts, stop)
    assert attempt == len(attempts(run))
    return code


def attempts(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.attempts.iterdir())


def test_a_run_that_gets_further_is_restarted_and_one_that_does_not_is_given_up(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    further = [[1, 0, KILLED], [1, 1, LOST_RANK], [2, 1, LOST_RANK], [3, KILLED, LOST_RANK]]
    stuck = [[3, 1, LOST_RANK], [2, 1, LOST_RANK], [9, 0, 0]]
    assert run_plan(run, further + stuck, max_restarts=2) == 1
    out, err = capfd.readouterr()
    assert attempts(run) == [f"{number:04d}" for number in range(1, 7)]
    assert [line.split()[1] for line in out.splitlines()] == list("123456")
    assert len({line.split()[3] for line in out.splitlines()}) == 6
    for number in range(2, 7):
        assert err.count(f"restarting, attempt {number} of {run.root}") == 1
    assert err.count("rank 1 was killed by signal 9; its log: ") == 1
    assert err.count("rank 0 was killed by signal 9; its log: ") == 1
    assert err.count("rank 0 failed with exit code 1; its log: ") == 4
    assert err.count("gave up: 2 restarts did not get beyond step 3") == 1
    assert "attempt 4" in (run.folder_of(4) / "rank-1.log").read_text()


def test_a_run_whose_failure_has_passed_ends_well(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(run, [[0, 1], [0, 1], [5, 0]], max_restarts=2) == 0
    assert attempts(run) == ["0001", "0002", "0003"]
    assert "gave up" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([STOPPED_ON_REQUEST, STOPPED_ON_REQUEST], STOPPED_ON_REQUEST),
        ([LOST_RANK, 2], 2),
        ([CANNOT_GO_ON, LOST_RANK], 1),
    ],
)
def test_what_would_come_again_or_was_asked_for_is_not_restarted(
    run: RunDirectory, codes: list[int], expected: int
) -> None:
    assert run_plan(run, [[1, *codes], [2, 0, 0]], max_restarts=3) == expected
    assert attempts(run) == ["0001"]


def test_an_attempt_that_dies_after_another_has_taken_over_is_not_restarted(
    run: RunDirectory,
) -> None:
    take_over = "from pretrain.run_dir import *; RunDirectory(Path(sys.argv[1])).begin_attempt()"
    script = f"import os, sys; from pathlib import Path; {take_over}; os.kill(os.getpid(), 9)"
    with StopSignals() as stop:
        command = [sys.executable, "-c", script, str(run.root)]
        assert run_ranks(run, command, 1, 3, stop) == (1, 1)
    assert attempts(run) == ["0001", "0002"]


def test_a_run_whose_directory_has_vanished_is_not_restarted(
    run: RunDirectory, tmp_path: Path
) -> None:
    script = "import os, sys; os.rename(sys.argv[1], sys.argv[2]); os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", script, str(run.root), str(tmp_path / "elsewhere")]
    with StopSignals() as stop:
        assert run_ranks(run, command, 1, 3, stop) == (1, 1)
    assert not run.root.exists()


def test_a_crash_loop_ends_with_a_diagnosis_before_the_restarts_are_used_up(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(run, [[1, 0, 1], *[[4, 0, KILLED]] * 9], max_restarts=8) == 1
    err = capfd.readouterr().err
    assert len(attempts(run)) == 4
    assert "gave up: attempts 2, 3 and 4 died of the same error after step 4, and another" in err
    assert f"rank 1 on {socket.gethostname()}: killed by signal 9 (SIGKILL)" in err
    failure = json.loads(run.failure_of(4).read_text())
    assert (failure["attempt"], failure["step"], failure["rank"]) == (4, 4, 1)
    assert (failure["kind"], failure["node"]) == ("killed", socket.gethostname())


def test_without_restarts_a_failure_is_the_end(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(run, [[1, 1], [2, 0]], max_restarts=0) == 1
    assert attempts(run) == ["0001"]
    assert "gave up" not in capfd.readouterr().err


def test_a_second_interrupt_ends_ranks_that_do_not_stop(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "import os, time\nwhile True: os.kill(os.getppid(), 2); time.sleep(0.1)"
    with StopSignals() as stop:
        assert run_ranks(run, [sys.executable, "-c", script], 1, 3, stop) == (1, 1)
    assert "ended at once" in capfd.readouterr().out


# Rank 0 fails; rank 1 says who it is, and waits.
ONE_WAITS = """
import os, sys, time
from pathlib import Path
if os.environ["RANK"] == "0":
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    sys.exit(1)
Path(sys.argv[1] + ".new").write_text(str(os.getpid()))
Path(sys.argv[1] + ".new").rename(sys.argv[1])
time.sleep(10_000)
"""


def test_a_rank_that_the_kernel_keeps_is_named_and_not_waited_for(
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # A process in uninterruptible sleep gets no signal, as far as others can tell.
    kill, waiting = os.kill, tmp_path / "pid"
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda self, number: None)
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    monkeypatch.setattr("launch.agent.KILL_S", 0.5)
    with StopSignals() as stop:
        command = [sys.executable, "-c", ONE_WAITS, str(waiting)]
        ended = run_ranks(run, command, 2, 3, stop)
    pid = int(waiting.read_text())
    kill(pid, signal.SIGKILL)
    assert ended == (1, 1)
    assert attempts(run) == ["0001"]
    assert f"not restarted: SIGKILL does not end process {pid}: " in capfd.readouterr().err


def test_ranks_are_killed_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(10_000)"]
    kept, ended = (subprocess.Popen(sleep) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(kept, "kill", lambda: None)
        assert end_ranks([kept, ended], patience_s=3) == [kept.pid]
    kept.kill()
    assert (kept.wait(), ended.wait()) == (KILLED, KILLED)


def test_a_request_that_came_before_there_were_ranks_starts_none(run: RunDirectory) -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGUSR2)
        assert run_ranks(run, ["false"], 1, 3, stop) == (STOPPED_ON_REQUEST, 0)
    assert not run.attempts.exists()
