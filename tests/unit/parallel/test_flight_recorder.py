"""What a dump of torch's flight recorder says of a rank's collectives."""

from pathlib import Path

import pytest
import torch

from parallel.flight_recorder import CollectiveTime, Recorded, oldest_in
from tests.ranks import run_on_ranks

NCCL_CASE = Path(__file__).with_name("nccl_recorder_case.py")


def entry(number: int, state: str, group: str = "1", **more) -> dict:
    return {
        "record_id": number,
        "process_group": [group, "mesh_fsdp"],
        "collective_seq_id": number + 5,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": "nccl:all_reduce",
        "state": state,
        **more,
    }


def trace(*entries: dict) -> dict:
    groups = {"1": {"name": "1", "desc": "mesh_fsdp", "ranks": "[0, 2]"}}
    return {"version": "2.10", "pg_config": groups, "entries": list(entries)}


def test_a_rank_waits_in_the_oldest_collective_that_has_not_completed() -> None:
    dump = trace(entry(0, "completed"), entry(1, "started"), entry(2, "scheduled"))
    assert oldest_in(dump) == Recorded("all_reduce 6", "mesh_fsdp", (0, 2))


def test_both_sides_of_a_transfer_are_in_the_same() -> None:
    send = entry(3, "scheduled", is_p2p=True, profiling_name="nccl:send 0->1")
    receive = entry(9, "scheduled", is_p2p=True, profiling_name="nccl:recv 1<-0")
    assert oldest_in(trace(send)) == oldest_in(trace(receive))


def test_a_rank_whose_collectives_have_all_completed_waits_in_none() -> None:
    assert oldest_in(trace(entry(0, "completed"))) is None
    assert oldest_in({"version": "2.10"}) is None


def test_each_collective_is_timed_once() -> None:
    time = CollectiveTime()
    entries = [entry(0, "completed", duration_ms=100.0), entry(1, "completed", duration_ms=50.0)]
    time.add([*entries, entry(2, "started")])
    time.add([*entries, entry(2, "completed", duration_ms=250.0)])
    time.add([])
    assert time.total_s() == 0.4


def test_collectives_that_the_recorder_has_dropped_are_taken_for_average() -> None:
    time = CollectiveTime()
    time.add([entry(n, "completed", duration_ms=100.0) for n in (4, 5, 6, 7)])
    assert time.total_s() == 0.8


def test_without_durations_nothing_is_known() -> None:
    time = CollectiveTime()
    time.add([entry(0, "completed")])
    assert time.total_s() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_what_nccl_leaves_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ENABLE_TIMING", "1")
    run_on_ranks(1, NCCL_CASE)
