"""When a batch job whose run is not done is started again."""

import json
from pathlib import Path

import pytest

from launch.requeue import is_worth_requeueing
from pretrain.run_dir import RunDirectory

AT_MOST = 3


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    root = tmp_path / "run"
    root.mkdir()
    return RunDirectory(root)


def fail(run: RunDirectory, step: int, job: str = "7") -> bool:
    """A start of the job that comes to `step` and fails; whether it gets another one."""
    run.begin_attempt()
    with run.metrics.open("a") as metrics:
        metrics.write(json.dumps({"train/step": step}) + "\n")
    return is_worth_requeueing(run, job, AT_MOST)


def stop(run: RunDirectory, step: int) -> bool:
    run.mark_stopped(step, run.begin_attempt(), "asked to stop by SIGUSR2")
    return is_worth_requeueing(run, "7", AT_MOST)


def fail_before_it_begins(run: RunDirectory) -> bool:
    return is_worth_requeueing(run, "7", AT_MOST)


def test_a_job_without_progress_is_given_up(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [fail(run, 0) for _ in range(4)] == [True, True, True, False]
    out, err = capsys.readouterr()
    assert "requeued: it has failed, 3 of 3 times without progress" in out
    assert "gave up: 3 requeues did not get beyond step 0" in err


def test_progress_gives_all_requeues_back(run: RunDirectory) -> None:
    steps = [5, 5, 5, 6, 6, 5, 4]
    assert [fail(run, step) for step in steps] == [True] * 6 + [False]


def test_a_request_to_stop_is_no_failure(run: RunDirectory) -> None:
    assert [stop(run, 0) for _ in range(8)] == [True] * 8
    assert [fail(run, 0) for _ in range(4)] == [True, True, True, False]


def test_an_old_request_does_not_excuse_starts_that_fail_before_they_begin(
    run: RunDirectory,
) -> None:
    assert stop(run, 3)
    assert [fail_before_it_begins(run) for _ in range(4)] == [True, True, True, False]


def test_another_job_begins_to_count_anew(run: RunDirectory) -> None:
    assert [fail(run, 2) for _ in range(4)] == [True, True, True, False]
    assert fail(run, 2, job="8")
    run.requeues.write_text('{"job": "8", "co')
    assert [fail(run, 2, job="8") for _ in range(4)] == [True, True, True, False]
