"""What an attempt died of, from logs as ranks leave them."""

import json
from pathlib import Path

import pytest

from launch.causes import Cause, find_cause
from pretrain.errors import CANNOT_GO_ON, LOST_RANK

STEP = "step 4/30  loss 5.9000  grad norm 1.000  lr 1.00e-03  9,000 tokens/s\n"
CONNECTION_CLOSED = """\
Traceback (most recent call last):
  File "/opt/farspan/pretrain/train.py", line 40, in train
RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer
"""
OUT_OF_MEMORY = """\
Traceback (most recent call last):
  File "/opt/farspan/pretrain/train.py", line 40, in train
    loss.backward()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total ...
If reserved but unallocated memory is large try setting ...

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/opt/farspan/pretrain/trainer.py", line 7, in step
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB. GPU 3 has a total ...
"""
NOTICED = "; noticed by rank 0 in all_reduce in backward (axis fsdp, ranks 0, 1) at step 5"
DEAD = f"error: rank 1 (process 4711 on node-17) is dead{NOTICED}\n"
STUCK = (
    "error: rank 1 (process 4711 on node-17) has not arrived: it is in read (stream.py:212) at "
    f"step 88 (data, for 301 s){NOTICED}: nothing has moved for 300 s (train.hang_timeout_s)\n"
)
FAILED = f"error: rank 1 (process 4711 on node-17) failed: MemoryError: no room{NOTICED}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    beats = [{"rank": rank, "host": f"node-{rank}"} for rank in range(3)]
    (tmp_path / "heartbeats.json").write_text(json.dumps(beats))
    return tmp_path


def leave(folder: Path, *logs: str) -> None:
    for rank, log in enumerate(logs):
        (folder / f"rank-{rank}.log").write_text(STEP + log)


@pytest.mark.parametrize(
    ("logs", "codes", "expected"),
    [
        (("", OUT_OF_MEMORY), {0: LOST_RANK, 1: 1}, ("memory", 1, "node-1", "torch.OutOfMemoryE")),
        ((DEAD, ""), {0: LOST_RANK, 1: -9}, ("killed", 1, "node-1", "killed by signal 9 (SIGKIL")),
        ((DEAD, ""), {0: LOST_RANK, 1: None}, ("lost rank", 1, "node-17", "rank 1 is dead")),
        (
            (STUCK, STUCK),
            {0: 70, 1: 70},
            ("hang", 1, "node-17", "rank 1 has not arrived: it is"),
        ),
        ((FAILED,), {0: 70, 1: 70}, ("memory", 1, "node-17", "rank 1 failed: MemoryError: no ro")),
        (("error: no room left\n",), {0: CANNOT_GO_ON}, ("final", 0, "node-0", "no room left")),
        (("error: no such shard\n", DEAD), {0: 2, 1: 70}, ("mistake", 0, "node-0", "no such sh")),
        (("", ""), {0: 0, 1: 3}, ("error", 1, "node-1", "exit code 3, and no error in the log")),
        (
            ("Fatal Python error: Segmentation fault\n\n",),
            {0: -11},
            ("killed", 0, "node-0", "killed by signal 11 (SIGSEGV): Fatal Python error: Segment"),
        ),
        (
            ("terminate called after throwing an instance of 'E'\n  what():  bad stream\n",),
            {0: -6},
            ("killed", 0, "node-0", "killed by signal 6 (SIGABRT): what():  bad stream"),
        ),
    ],
)
def test_the_rank_that_explains_the_others_is_to_blame(
    folder: Path,
    logs: tuple[str, ...],
    codes: dict[int, int | None],
    expected: tuple[str, int, str, str],
) -> None:
    leave(folder, *logs)
    cause = find_cause(folder, codes)
    assert (cause.kind, cause.rank, cause.node) == expected[:3]
    assert cause.error.startswith(expected[3])
    assert "noticed by" not in cause.error


def test_without_exit_codes_a_rank_with_an_error_of_its_own_is_to_blame(folder: Path) -> None:
    leave(folder, DEAD, STUCK, OUT_OF_MEMORY)
    assert find_cause(folder).rank == 2
    leave(folder, DEAD, "error: no such shard\n", CONNECTION_CLOSED)
    assert find_cause(folder, code=2, nodes=["a", "b", "c"]) == Cause(
        "mistake", 1, "b", "no such shard"
    )
    leave(folder, "", "error: the ranks did not come together: timeout\n", CONNECTION_CLOSED)
    assert find_cause(folder).error == "the ranks did not come together: timeout"
    leave(folder, "", CONNECTION_CLOSED, DEAD)
    assert find_cause(folder) == Cause("lost rank", 1, "node-17", "rank 1 is dead")


def test_nothing_is_known_of_ranks_that_have_left_no_word(tmp_path: Path) -> None:
    expected = Cause("error", None, "", "exit code 137, before any rank had a log")
    assert find_cause(tmp_path, code=137) == expected
    leave(tmp_path, "")
    expected = Cause("error", None, "", "exit code 137, and no error in the log")
    assert find_cause(tmp_path, code=137) == expected


def test_only_the_last_error_counts_and_of_a_long_log_only_the_end_is_read(folder: Path) -> None:
    leave(folder, OUT_OF_MEMORY + STEP * 10_000 + CONNECTION_CLOSED)
    cause = find_cause(folder, {0: 1})
    assert cause.kind == "error"
    assert cause.error.endswith("Connection closed by peer")
