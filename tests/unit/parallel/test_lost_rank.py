"""The survivors of a lost rank name it and the collective in which they missed it."""

import re
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

CASES = Path(__file__).with_name("lost_rank_cases.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost_rank")
    run_on_ranks(4, CASES, str(folder))
    return folder


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("killed", r"rank 3 \(process \d+ on \S+\) is dead"),
        ("stopped", r"rank 3 \(process \d+ on \S+\) does not answer \(stopped, or cut off\)"),
        ("stuck", r"rank 3 \(process \d+ on \S+\) has not arrived: it is in wait_for_data \(.*\)"),
        ("failed", r"rank 3 \(process \d+ on \S+\) failed: ValueError: no such shard"),
        ("astray", r".*rank 3 \(.*\) has not arrived: it is in barrier \(all ranks\) at step 3.*"),
    ],
)
def test_survivors_agree_on_the_rank_and_the_collective(folder: Path, case: str, lost: str) -> None:
    first, *others = (path.read_text() for path in sorted(folder.glob(f"{case}-?.txt")))
    assert others[:2] == [first, first]
    noticed = (
        r"noticed by rank (2 in all_reduce in backward \(axis tp, ranks 2, 3\)"
        r"|[01] in all_reduce( in backward)? \(axis (fsdp|tp), ranks [0-3], [0-3]\)) at step 3: .+"
    )
    assert re.fullmatch(rf"{lost}( at step 3)?; {noticed}", first), first


@pytest.mark.parametrize("case", ["killed-store", "stopped-store"])
def test_the_rank_with_the_store_is_named_without_it(folder: Path, case: str) -> None:
    errors = [(folder / f"{case}-{rank}.txt").read_text() for rank in (1, 2, 3)]
    lost = r"rank 0 \(process \d+ on \S+\) is dead, stopped or cut off, and the job's store with it"
    assert re.fullmatch(
        lost + r"; noticed by rank 1 in all_reduce in backward \(axis tp, ranks 0, 1\) .*",
        errors[0],
    )
    assert all(re.match(lost, error) for error in errors)
