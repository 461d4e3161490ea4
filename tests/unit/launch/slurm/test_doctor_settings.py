"""What the doctor says of Slurm's settings."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.client import NodeInfo, PartitionInfo
from launch.slurm.doctor.findings import Finding
from launch.slurm.doctor.settings import (
    Site,
    check_job,
    check_settings,
    refused_by_slurm,
    unknown_partition,
)
from launch.slurm.profile import Profile
from pretrain.errors import UserError

CONFIG = {
    "SLURM_VERSION": "23.11.4",
    "JobRequeue": "1",
    "SelectType": "select/cons_tres",
    "KillWait": "30 sec",
}
PARTITION = PartitionInfo(
    name="gpu",
    is_default=True,
    state="UP",
    nodes=("a1", "a2", "a3"),
    max_time_s=86400,
    preempt_mode="REQUEUE",
    fields={},
)
NODES = [
    NodeInfo(name=name, state="IDLE", cpus=64, gpus=8, gpu_types=("h100",), partitions=("gpu",))
    for name in PARTITION.nodes
]
PROFILE = Profile(
    partition="gpu",
    gpus="gpus-per-node",
    gpu_type="h100",
    ranks_per_node=8,
    time="24:00:00",
    shared_paths=("/shared",),
)


def _site(
    profile: Profile = PROFILE,
    config: dict[str, str] = CONFIG,
    partition: PartitionInfo = PARTITION,
    nodes: list[NodeInfo] = NODES,
) -> Site:
    return Site.of(profile, config, [partition], nodes)


def _with(**changed: object) -> Profile:
    return PROFILE.model_copy(update=changed)


def _findings(site: Site, wanted: int = 2, directory: str = "/shared/runs") -> list[Finding]:
    checks = check_settings(site, wanted, Path(directory))
    return [finding for check in checks for finding in check.findings]


@pytest.mark.parametrize(
    "site",
    [
        _site(),
        _site(_with(partition=None)),
        _site(_with(gpus="gres", gpu_type=None)),
        _site(_with(gpus="none")),
        _site(_with(gpus="auto", ranks_per_node="auto")),
        _site(_with(time=None)),
        _site(partition=replace(PARTITION, max_time_s=None)),
        # What a batch script is left then is enough for it to requeue its job.
        _site(partition=replace(PARTITION, preempt_mode="CANCEL")),
    ],
)
def test_nothing_is_said_of_a_site_that_is_as_its_profile_says(site: Site) -> None:
    assert _findings(site) == []


@pytest.mark.parametrize(
    ("site", "where", "says"),
    [
        (_site(config=CONFIG | {"SLURM_VERSION": "20.02.7"}), "this cluster", "20.02.7 is older"),
        (_site(partition=replace(PARTITION, state="DRAIN")), "gpu", "partition gpu is DRAIN"),
        (_site(partition=replace(PARTITION, max_nodes=1)), "gpu", "at most --nodes 1"),
        (_site(partition=replace(PARTITION, max_time_s=3600)), "gpu", "allows 60 minutes"),
        (_site(_with(time="5")), "gpu", "asked to stop 300 s before it"),
        (
            _site(
                _with(account="ours"), partition=replace(PARTITION, allowed_accounts=("theirs",))
            ),
            "gpu",
            "account 'ours': partition gpu takes theirs",
        ),
        (
            _site(
                nodes=[NODES[0], *(replace(one, state="DOWN", reason="fan") for one in NODES[1:])]
            ),
            "a2, a3",
            "1 others are fewer than the 2 asked for (a2: fan; a3: fan)",
        ),
        (_site(config=CONFIG | {"JobRequeue": "0"}), "slurm.conf", "JobRequeue=0"),
        (
            _site(
                config=CONFIG | {"KillWait": "5 sec"},
                partition=replace(PARTITION, preempt_mode="CANCEL"),
            ),
            "gpu",
            "its batch script requeues it, for which KillWait leaves 5 s",
        ),
        (
            _site(nodes=[replace(node, gpus=0, gpu_types=()) for node in NODES]),
            "gpu",
            "has no GPUs that Slurm knows of",
        ),
        (_site(_with(gpu_type="h200")), "gpu", "GPUs of another type: set gpu_type to h100"),
        (_site(_with(ranks_per_node=16)), "gpu", "has 8 GPUs"),
        (
            _site(config=CONFIG | {"SelectType": "select/cons_res"}),
            "slurm.conf",
            "select/cons_res does not know --gpus-per-node",
        ),
    ],
)
def test_each_setting_that_is_wrong_is_told_where_it_is(site: Site, where: str, says: str) -> None:
    (finding,) = _findings(site)
    assert finding.where == where
    assert says in finding.what


def test_a_partition_that_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        _site(_with(partition="gpus"))
    (finding,) = unknown_partition(error.value).findings
    assert "did you mean gpu?" in finding.what


def test_a_directory_that_only_this_machine_sees_is_told() -> None:
    (finding,) = _findings(_site(), directory="/dev/shm/runs")
    assert "is not on a shared file system: /dev/shm/runs is on tmpfs" in finding.what


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        ("allocation failure: Invalid account or account/partition combination", "account in"),
        ("allocation failure: Invalid qos specification", "qos in"),
        ("allocation failure: Requested node configuration is not available", "cpus_per_rank"),
        ("Invalid generic resource (gres) specification", "gpus and gpu_type"),
        ("Invalid feature specification", "constraint in"),
        ("Job violates accounting/QOS policy", "--nodes=2 --mem=0"),
    ],
)
def test_what_sbatch_refuses_is_told_with_the_setting_to_change(refusal: str, fix: str) -> None:
    (finding,) = refused_by_slurm(refusal, ["--nodes=2", "--mem=0"]).findings
    assert finding.what == refusal
    assert fix in finding.fix


def test_a_job_that_may_not_be_requeued_is_found() -> None:
    assert check_job(_site(), {"Requeue": "1"}).findings == ()
    (finding,) = check_job(_site(), {"Requeue": "0"}).findings
    assert "may not be requeued" in finding.what
