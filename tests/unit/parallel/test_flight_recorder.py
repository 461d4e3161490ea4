"""What a dump of torch's flight recorder says of a rank's collectives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.local import free_port, rank_environment
from parallel.call_stack import Activity, activity_on_gpu
from parallel.flight_recorder import (
    TIMING,
    CollectiveTime,
    Recorded,
    is_timed,
    oldest_in,
    record_nccl,
)
from tests.ranks import ROOT, run_on_ranks

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
    assert oldest_in(dump) == Recorded("all_reduce 6", "mesh_fsdp", (0, 2), has_begun=True)


def test_one_that_is_enqueued_has_not_begun() -> None:
    pending = oldest_in(trace(entry(1, "scheduled"), entry(2, "started", group="2")))
    assert pending == Recorded("all_reduce 6", "mesh_fsdp", (0, 2), has_begun=False)


def test_transfers_of_a_batch_are_where_the_batch_is() -> None:
    # Of a batch only the last entry has events; the others stay "scheduled" for ever.
    def batch(first: int, state: str) -> list[dict]:
        p2p = {"is_p2p": True, "p2p_seq_id": first}
        names = ("nccl:send 0->1", "nccl:recv 0<-1", "nccl:coalesced")
        states = ("scheduled", "scheduled", state)
        return [
            entry(first + n, state, **p2p, profiling_name=name)
            for n, (name, state) in enumerate(zip(names, states, strict=True))
        ]

    done = batch(1, "completed")
    assert oldest_in(trace(*done)) is None
    after = oldest_in(trace(*done, entry(4, "started")))
    assert after == Recorded("all_reduce 9", "mesh_fsdp", (0, 2), has_begun=True)
    inside = oldest_in(trace(*done, *batch(4, "started")))
    assert inside == Recorded("send and receive", "mesh_fsdp", (0, 2), has_begun=True)


@pytest.mark.parametrize(
    ("has_begun", "timed", "what", "ranks"),
    [
        (True, True, "all_reduce 6 (axis fsdp, ranks 0, 2)", (0, 2)),
        (False, True, "GPU work before all_reduce 6 (axis fsdp, ranks 0, 2)", ()),
        (False, False, "all_reduce 6 (axis fsdp, ranks 0, 2), or GPU work before it", (0, 2)),
    ],
)
def test_only_in_one_that_has_begun_a_rank_waits(
    monkeypatch: pytest.MonkeyPatch,
    has_begun: bool,
    timed: bool,
    what: str,
    ranks: tuple[int, ...],
) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    pending = Recorded("all_reduce 6", "mesh_fsdp", (0, 2), has_begun)
    assert activity_on_gpu(pending, is_timed=timed) == Activity(what, ranks)


def test_nccl_is_told_to_record_unless_the_user_has_said_otherwise() -> None:
    environment: dict[str, str] = {}
    record_nccl(environment)
    assert environment == {
        "TORCH_NCCL_ENABLE_TIMING": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    chosen = {
        "NCCL_ENABLE_TIMING": "0",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "50000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    environment = dict(chosen)
    record_nccl(environment)
    assert environment == chosen


@pytest.mark.parametrize(
    ("chosen", "timed"),
    [
        ({}, False),
        ({"TORCH_NCCL_ENABLE_TIMING": "1"}, True),
        ({"TORCH_NCCL_ENABLE_TIMING": "1", "NCCL_ENABLE_TIMING": "no"}, False),
    ],
)
def test_of_two_names_of_a_setting_the_older_wins(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], timed: bool
) -> None:
    for name in TIMING:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert is_timed() == timed


# A build without CUDA that is told that there is a GPU, up to where NCCL would begin.
JOIN = """
import os
from datetime import timedelta
import torch
import torch.distributed as dist
from parallel.mesh import join_ranks

def begin(backend, device_id, **ranks):
    print(backend, device_id, os.environ.get("TORCH_NCCL_ENABLE_TIMING"), flush=True)

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
dist.init_process_group = begin
join_ranks(timedelta(minutes=1))
"""


def test_the_groups_of_nccl_are_made_with_timing_and_on_the_gpu_that_a_task_is_shown() -> None:
    environment = os.environ | rank_environment(0, 1, free_port()) | {"LOCAL_RANK": "5"}
    environment.pop("TORCH_NCCL_ENABLE_TIMING", None)
    command = [sys.executable, "-c", JOIN]
    begun = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert begun.strip() == "cpu:gloo,cuda:nccl cuda:0 1"


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
def test_what_nccl_leaves_in_it() -> None:
    run_on_ranks(1, NCCL_CASE)
