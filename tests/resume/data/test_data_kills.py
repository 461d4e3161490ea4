"""A data run that is killed at random moments ends with the bytes of one that was not."""

from pathlib import Path

from bench.data_kills import kill_runs


def test_ten_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    killed = kill_runs(tmp_path, kills=10, seed=1)
    assert killed.moments.total() == 10
    assert killed.runs >= 1
    assert killed.differing == []
