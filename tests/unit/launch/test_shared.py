"""What the user is told when a rank of `run_shared` does not come to its end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import typer

from launch.shared import run_shared
from tests.ranks import ROOT, TIMEOUT_S

CASE = "tests.unit.launch.shared_case"
INTERRUPTED = 130
# A shell that runs the tests in the background has them ignore ctrl-C.
COMMAND = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from launch.shared import run_shared
try:
    run_shared({CASE!r}, ["waits"], 2)
except KeyboardInterrupt:
    sys.exit({INTERRUPTED})
"""


def test_a_result_may_be_longer_than_a_pipe_holds() -> None:
    assert run_shared(CASE, ["result"], 2) == {"digits": "7" * 200_000}


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("killed", 1, "error: rank 1 of 2 was killed by signal 9 (SIGKILL); the others were ended"),
        ("failed", 3, "error: rank 1 of 2 failed with exit code 3:\nno such shard"),
        ("stopped", 1, "error: rank 0 does not answer"),
        ("mistaken", 2, "error: no such batch"),
    ],
)
def test_a_rank_that_fails_is_named_once(
    how: str, code: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        run_shared(CASE, [how], 2)
    assert ended.value.exit_code == code
    assert capfd.readouterr().err.strip() == told


def test_ctrl_c_ends_all_ranks_without_a_word_of_theirs() -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stderr
    try:
        assert started.stderr.readline() == "rank waits\n"
        os.killpg(started.pid, signal.SIGINT)
        assert started.stderr.read() == ""
        assert started.wait() == INTERRUPTED
        # No rank is left, once somebody has waited for those that were killed.
        deadline = time.monotonic() + TIMEOUT_S
        while _is_there(started.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        started.kill()


def _is_there(group: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False
