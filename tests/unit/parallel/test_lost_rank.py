"""The survivors of a lost rank name it and the collective in which they missed it."""

import json
import re
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

CASES = Path(__file__).with_name("lost_rank_cases.py")
RANK_3 = r"rank 3 \(process \d+ on \S+\)"
AT_STEP_3 = r"at step 3 \(train, for \d+ s\)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost_rank")
    run_on_ranks(4, CASES, str(folder))
    return folder


def told(folder: Path) -> dict[int, str]:
    """What each rank that ended by itself was told."""
    return {
        rank: path.read_text()
        for rank in range(4)
        if (path := folder / f"rank-{rank}.txt").exists()
    }


def codes(folder: Path) -> list[int]:
    return [int((folder / f"rank-{rank}.code").read_text()) for rank in range(4)]


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("killed", rf"{RANK_3} is dead"),
        ("stopped", rf"{RANK_3} does not answer \(stopped, or cut off\)"),
        ("stuck", rf"{RANK_3} has not arrived: it is in wait_for_data \(.*\) {AT_STEP_3}"),
        ("failed", rf"{RANK_3} failed: ValueError: no such shard"),
        ("astray", rf".*{RANK_3} has not arrived: it is in barrier \(all ranks\) {AT_STEP_3}.*"),
    ],
)
def test_survivors_agree_on_the_rank_and_the_collective(folder: Path, case: str, lost: str) -> None:
    messages = told(folder / case)
    first = messages[0]
    assert [messages[1], messages[2]] == [first, first]
    # A rank that has gone astray waits, too, and may be the first whose patience ends.
    noticed = (
        r"noticed by rank (2 in all_reduce in backward \(axis tp, ranks 2, 3\)"
        r"|3 in barrier \(all ranks\)"
        r"|[01] in all_reduce( in backward)? \(axis (fsdp|tp), ranks [0-3], [0-3]\)) "
        rf"{AT_STEP_3}: .+; stacks: .+"
    )
    assert re.fullmatch(rf"{lost}; {noticed}", first), first


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("hang-stopped", rf"{RANK_3} does not answer \(stopped, or cut off\)"),
        ("hang-native", rf"{RANK_3} does not answer \(stopped, or cut off\)"),
        ("hang-loop", rf"{RANK_3} has not arrived: it is in loop_forever \(.*\) {AT_STEP_3}"),
        (
            "hang-astray",
            rf".*{RANK_3} has not arrived: it is in barrier \(all ranks\) {AT_STEP_3}.*",
        ),
        (
            "hang-all",
            rf"(rank \d \(.*\) waits for no other rank: it is in wait_for_data \(.*\) {AT_STEP_3}"
            r"(; )?){4}",
        ),
    ],
)
def test_a_hang_ends_all_that_run_with_the_rank_to_blame(
    folder: Path, case: str, lost: str
) -> None:
    messages = told(folder / case)
    ended = [0, 1, 2] if case in ("hang-stopped", "hang-native") else [0, 1, 2, 3]
    assert list(messages) == ended
    first = messages[0]
    assert set(messages.values()) == {first}
    assert re.fullmatch(
        rf"{lost}; noticed by rank \d in \w+ .*{AT_STEP_3}: nothing has moved for \d+ s .+", first
    ), first
    assert codes(folder / case) == [70, 70, 70, 70 if 3 in ended else -9]


@pytest.mark.parametrize("case", ["killed-store", "stopped-store", "hang-stopped-store"])
def test_the_rank_with_the_store_is_named_without_it(folder: Path, case: str) -> None:
    messages = told(folder / case)
    assert list(messages) == [1, 2, 3]
    lost = r"rank 0 \(process \d+ on \S+\) is dead, stopped or cut off, and the job's store with it"
    assert re.fullmatch(
        lost + r"; noticed by rank 1 in all_reduce in backward \(axis tp, ranks 0, 1\) .*",
        messages[1],
    )
    assert all(re.match(lost, message) for message in messages.values())


def test_every_rank_that_runs_leaves_its_stacks(folder: Path) -> None:
    expected = {"hang-loop": "loop_forever", "hang-astray": "call_another_collective"}
    for case, innermost in expected.items():
        stacks = folder / case / "stacks"
        for rank in range(4):
            text = (stacks / f"rank-{rank}.txt").read_text()
            assert text.startswith(f"rank {rank} at step 3 (train), stacks of all threads:")
            assert f"in {innermost if rank == 3 else 'all_reduce'}\n" in text, text
    dead = (folder / "killed" / "stacks" / "rank-2.txt").read_text()
    assert "Traceback (most recent call last)" in dead


def test_stacks_of_a_rank_whose_interpreter_is_blocked_are_in_its_log(folder: Path) -> None:
    log = (folder / "hang-native" / "rank-3.log").read_text()
    assert "Timeout (0:00:20)!" in log
    assert "in block_interpreter" in log


def test_heartbeats_of_all_ranks_lie_in_one_file(folder: Path) -> None:
    beats = json.loads((folder / "hang-loop" / "heartbeats.json").read_text())
    assert [beat["rank"] for beat in beats] == [0, 1, 2, 3]
    assert {(beat["step"], beat["phase"]) for beat in beats} == {(3, "train")}
    assert all(beat["pid"] and beat["host"] and beat["beat"] <= beat["reported"] for beat in beats)


@pytest.mark.parametrize("case", ["hang-stopped", "hang-native"])
def test_the_heartbeat_of_a_rank_that_does_not_run_is_old(folder: Path, case: str) -> None:
    beats = json.loads((folder / case / "heartbeats.json").read_text())
    assert beats[3]["reported"] < min(beat["reported"] for beat in beats[:3])


def test_a_slow_step_is_not_a_hang(folder: Path) -> None:
    assert set(told(folder / "slow").values()) == {"finished"}
    assert codes(folder / "slow") == [0, 0, 0, 0]


def test_a_straggler_is_named(folder: Path) -> None:
    rank, over_median = (folder / "straggler" / "slowest.txt").read_text().split()
    assert rank == "2"
    assert float(over_median) > 2
    warnings = re.findall("^warning: .*", (folder / "straggler" / "rank-0.log").read_text(), re.M)
    assert len(warnings) == 1
    assert re.match(r"warning: rank 2 \(process \d+ on \S+\) is the slowest: ", warnings[0])
