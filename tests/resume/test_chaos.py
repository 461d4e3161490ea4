"""The benchmark that kills runs, with as many kills as CI has time for."""

import subprocess
import sys

import pytest

from tests.ranks import ROOT


@pytest.mark.slow
def test_nothing_is_lost_in_ten_kills() -> None:
    command = (sys.executable, "-m", "bench.chaos", "--kills", "10", "--goodput-kills", "0")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "exact" in line]
    assert len(rows) == 2
    assert "| bitwise |" in rows[0]
