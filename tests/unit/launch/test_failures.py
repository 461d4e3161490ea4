"""Which runs are started again; each attempt comes to a step and ends as planned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cancelled import mark_cancelled
from launch.causes import Cause
from launch.failures import Verdict, judge, note_failure, read_failure
from pretrain.run_dir import RunDirectory

AT_MOST = 3
DEAD = Cause("lost rank", 3, "node-17", "rank 3 is dead")
FULL = Cause("memory", 3, "node-17", "OutOfMemoryError: tried to allocate 2.00 GiB at 0x7f01")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    root = tmp_path / "run"
    root.mkdir()
    return RunDirectory(root)


def begin(run: RunDirectory, step: int) -> int:
    attempt = run.begin_attempt()
    with run.metrics.open("a") as metrics:
        metrics.write(json.dumps({"train/step": step}) + "\n")
    return attempt


def fail(run: RunDirectory, step: int, cause: Cause | None = None, chain: str = "7") -> Verdict:
    """An attempt that comes to `step` and dies, of something else each time unless told of what."""
    attempt = begin(run, step)
    cause = cause or Cause("error", 0, "node-1", f"{'x' * attempt}Error")
    note_failure(run, attempt, chain, cause)
    return judge(run, chain, AT_MOST)


def stop(run: RunDirectory, step: int) -> Verdict:
    run.mark_stopped(step, begin(run, step), "asked to stop by SIGUSR2")
    return judge(run, "7", AT_MOST)


def fail_before_it_begins(run: RunDirectory) -> bool:
    attempt = max(run.all_attempts(), default=0)
    failure = note_failure(run, None, "7", Cause("error", None, "", f"{'x' * attempt}Error"))
    assert failure.attempt == attempt + 1
    return judge(run, "7", AT_MOST).goes_on


def test_a_run_without_progress_is_given_up(run: RunDirectory) -> None:
    verdicts = [fail(run, 0) for _ in range(4)]
    assert [verdict.goes_on for verdict in verdicts] == [True, True, True, False]
    assert [verdict.starts_left for verdict in verdicts] == [2, 1, 0, 0]
    assert verdicts[2].text == "it has failed after step 0, 3 of 3 times without progress"
    assert verdicts[3].text.startswith("gave up: 3 restarts did not get beyond step 0; the last")
    assert "rank 0 on node-1: xxxxError" in verdicts[3].text
    assert f"`farspan launch resubmit {run.root}` goes on" in verdicts[3].text


def test_progress_gives_all_restarts_back_and_less_than_before_is_none(run: RunDirectory) -> None:
    steps = [5, 5, 5, 6, 6, 5, 6]
    assert [fail(run, step).goes_on for step in steps] == [True] * 6 + [False]


def test_the_same_error_at_the_same_step_three_times_is_a_crash_loop(run: RunDirectory) -> None:
    again = replace(FULL, error="OutOfMemoryError: tried to allocate 4.50 GiB at 0x7f99")
    elsewhere = replace(again, node="node-20", rank=5)
    assert fail(run, 4).goes_on
    assert [fail(run, 8, cause).goes_on for cause in (FULL, again)] == [True, True]
    verdict = fail(run, 8, elsewhere)
    assert not verdict.goes_on
    first, second, *_, last = verdict.text.splitlines()
    assert first.startswith("gave up: attempts 2, 3 and 4 died of the same error after step 8")
    assert second == f"  rank 5 on node-20: {elsewhere.error}"
    assert "--explain-memory" in verdict.text
    assert str(run.folder_of(4)) in last


@pytest.mark.parametrize(
    ("deaths", "goes_on"),
    [
        ([(8, FULL), (8, DEAD), (8, FULL)], True),
        ([(8, FULL), (9, FULL), (9, FULL)], True),
        (
            [(8, DEAD), (8, replace(DEAD, error="rank 9 is dead", rank=9, node="n")), (8, DEAD)],
            False,
        ),
        ([(0, FULL)] * 3, False),
        ([(8, Cause("node", None, "node-17", "node-17 has failed"))] * 3, True),
    ],
)
def test_another_step_or_error_or_a_node_that_failed_is_no_crash_loop(
    run: RunDirectory, deaths: list[tuple[int, Cause]], goes_on: bool
) -> None:
    *_, verdict = [fail(run, step, cause) for step, cause in deaths]
    assert verdict.goes_on == goes_on


@pytest.mark.parametrize("kind", ["mistake", "final"])
def test_what_would_end_alike_is_not_started_again(run: RunDirectory, kind: str) -> None:
    verdict = fail(run, 3, replace(FULL, kind=kind))  # type: ignore[arg-type]
    assert not verdict.goes_on
    assert FULL.error in verdict.text


def test_a_request_to_stop_is_no_failure(run: RunDirectory) -> None:
    assert [stop(run, 0).goes_on for _ in range(8)] == [True] * 8
    assert "asked to stop" in stop(run, 0).text
    assert [fail(run, 0).goes_on for _ in range(4)] == [True, True, True, False]


def test_an_old_request_does_not_excuse_starts_that_fail_before_they_begin(
    run: RunDirectory,
) -> None:
    assert stop(run, 3).goes_on
    assert [fail_before_it_begins(run) for _ in range(4)] == [True, True, True, False]


def test_a_run_that_is_cancelled_or_done_is_not_started_again(run: RunDirectory) -> None:
    mark_cancelled(run, "me on here", ["7"])
    verdict = stop(run, 3)
    assert (verdict.goes_on, verdict.text.partition(";")[0]) == (False, "cancelled by me on here")
    # Another job, that somebody has submitted since.
    assert fail(run, 3, chain="8").goes_on
    mark_cancelled(run, "me on here", [])
    assert not fail(run, 3, chain="process 9 on here").goes_on
    assert fail(run, 3, chain="9").goes_on
    run.mark_done(9, begin(run, 9))
    assert judge(run, "7", AT_MOST) == Verdict(False, "done")


def test_another_chain_begins_to_count_anew(run: RunDirectory) -> None:
    assert [fail(run, 2).goes_on for _ in range(4)] == [True, True, True, False]
    assert fail(run, 2, chain="8").goes_on
    assert [fail(run, 2, FULL, chain="9").goes_on for _ in range(3)] == [True, True, False]
    assert fail(run, 2, FULL, chain="10").goes_on


def test_a_record_that_cannot_be_read_is_none(run: RunDirectory) -> None:
    fail(run, 2)
    assert read_failure(run, 1)
    run.failure_of(1).write_text('{"attempt": 1, "ste')
    assert read_failure(run, 1) is None
    assert read_failure(run, 2) is None
