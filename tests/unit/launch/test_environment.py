"""The variables of the ranks: who decides on a value, and what is said of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import Variable, describe, environment_of_ranks, note_environment
from launch.slurm.profile import Network, Profile, Setting
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT


def variables(inherited: dict[str, str], profile: Profile | None = None) -> dict[str, Variable]:
    found = environment_of_ranks(
        ranks=16,
        ranks_here=8,
        address="n1",
        port=20000,
        cpus=12,
        attempt=3,
        profile=profile,
        scratch="/scratch",
        inherited=inherited,
    )
    assert all(variable.why for variable in found)
    return {variable.name: variable for variable in found}


def test_what_is_set_already_stays_but_for_how_the_ranks_meet() -> None:
    before = {"OMP_NUM_THREADS": "3", "MASTER_ADDR": "elsewhere", "WORLD_SIZE": "1"}
    found = variables(before)
    assert found["OMP_NUM_THREADS"].value == "3"
    assert found["OMP_NUM_THREADS"].why == "set before farspan began, which would take 12"
    assert (found["MASTER_ADDR"].value, found["WORLD_SIZE"].value) == ("n1", "16")
    assert variables({})["OMP_NUM_THREADS"].value == "12"


THREADS = """
import os
from launch.environment import environment_of_ranks
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
found = environment_of_ranks(ranks=1, ranks_here=1, address="n1", port=1, inherited={})
print(*(one.value for one in found if one.name == "OMP_NUM_THREADS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cores of a process are Linux's")
def test_ranks_share_the_cores_that_this_process_may_use() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_a_profile_decides_what_farspan_would() -> None:
    setting = Setting(value="7", why="this site wants it")
    profile = Profile(environment={"OMP_NUM_THREADS": setting, "NCCL_IB_TC": setting})
    found = variables({"NCCL_IB_TC": "8"}, profile)
    assert found["OMP_NUM_THREADS"] == Variable("OMP_NUM_THREADS", "7", "this site wants it")
    assert found["NCCL_IB_TC"].value == "8"


def test_gloo_takes_the_name_of_an_interface_and_no_pattern() -> None:
    found = variables({}, Profile(network=Network(interface="eth0")))
    assert (found["NCCL_SOCKET_IFNAME"].value, found["GLOO_SOCKET_IFNAME"].value) == ("eth0",) * 2
    found = variables({}, Profile(network=Network(interface="^lo")))
    assert found["NCCL_SOCKET_IFNAME"].value == "^lo"
    assert "GLOO_SOCKET_IFNAME" not in found


def test_it_is_kept_with_the_attempt_and_can_be_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt = run.new_attempt()
    found = list(variables({}).values())
    note_environment(run, attempt, found)
    kept = [Variable(**row) for row in json.loads(run.environment_of(attempt).read_text())]
    assert kept == found
    assert "  WORLD_SIZE=16" in describe(found)
