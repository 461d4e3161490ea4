"""What the doctor says of Slurm's settings."""

from dataclasses import replace

import pytest

from launch.slurm.client import NodeInfo, PartitionInfo
from launch.slurm.doctor.findings import Finding
from launch.slurm.doctor.settings import Site, check_job, check_refusal, check_settings
from launch.slurm.profile import Profile

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
NODES = [NodeInfo(name=name, state="IDLE", gpus=8, gpu_types=("h100",)) for name in PARTITION.nodes]
PROFILE = Profile(
    partition="gpu", gpus="gpus-per-node", gpu_type="h100", ranks_per_node=8, time="24:00:00"
)
SITE = Site(PROFILE, CONFIG, [PARTITION], NODES, {})


def _profile(**changed: object) -> Site:
    return replace(SITE, profile=PROFILE.model_copy(update=changed))


def _partition(**changed: object) -> Site:
    return replace(SITE, partitions=[replace(PARTITION, **changed)])  # type: ignore[arg-type]


def _config(**changed: str) -> Site:
    return replace(SITE, config=CONFIG | changed)


def _nodes(*nodes: NodeInfo) -> Site:
    return replace(SITE, all_nodes=nodes)


def _findings(site: Site, wanted: int = 2) -> list[Finding]:
    return [finding for check in check_settings(site, wanted) for finding in check.findings]


@pytest.mark.parametrize(
    "site",
    [
        SITE,
        _profile(partition=None),
        _profile(gpus="gres", gpu_type=None),
        _profile(gpus="none"),
        _profile(time=None),
        _partition(max_time_s=None),
    ],
)
def test_nothing_is_said_of_a_site_that_is_as_its_profile_says(site: Site) -> None:
    assert _findings(site) == []


@pytest.mark.parametrize(
    ("site", "where", "says", "fix"),
    [
        (_config(SLURM_VERSION="20.02.7"), "this cluster", "Slurm 20.02.7 is older", "updated"),
        (_profile(partition="gpus"), "gpus", "did you mean gpu?", "one of gpu"),
        (
            replace(_profile(partition=None), partitions=[replace(PARTITION, is_default=False)]),
            "this cluster",
            "no partition is the default one",
            "one of gpu",
        ),
        (_partition(state="DRAIN"), "gpu", "its state is DRAIN", "wait"),
        (_partition(max_nodes=1), "gpu", "a job may have 1 nodes, 2 are", "--nodes 1"),
        (
            _nodes(
                NODES[0], replace(NODES[1], state="DOWN", reason="bad fan"), NodeInfo(name="b1")
            ),
            "gpu",
            "of 2 there 1 are usable; a2: bad fan",
            "--nodes 1",
        ),
        (_partition(max_time_s=3600), "gpu", "may take 1:00:00 h, the profile asks for 24", "time"),
        (_profile(time="8"), "gpu", "of a limit of 8 min, 5 min are kept", "stop_before_s"),
        (_config(JobRequeue="0"), "slurm.conf", "JobRequeue=0", "--requeue"),
        (
            replace(SITE, environment={"SBATCH_NO_REQUEUE": "1"}),
            "your environment",
            "SBATCH_NO_REQUEUE forbids Slurm",
            "remove it",
        ),
        (_profile(options=("--no-requeue",)), "the profile's options", "forbids", "remove it"),
        (_partition(preempt_mode="CANCEL"), "gpu", "PreemptMode=CANCEL", "resubmit"),
        (
            _nodes(*(replace(node, gpus=0, gpu_types=()) for node in NODES)),
            "gpu",
            "Slurm knows of no GPU",
            "gpus: none",
        ),
        (_profile(gpu_type="h200"), "gpu", "no node has GPUs of type h200", "gpu_type"),
        (
            _nodes(*(replace(node, gpu_types=()) for node in NODES)),
            "gpu",
            "types there: none: Slurm does not tell them apart",
            "leave it out",
        ),
        (_profile(ranks_per_node=16), "gpu", "16 ranks a node, each with a GPU", ": 8"),
        (_config(SelectType="select/cons_res"), "slurm.conf", "--gpus-per-node", "gpus: gres"),
    ],
)
def test_each_setting_that_is_wrong_is_told_where_it_is(
    site: Site, where: str, says: str, fix: str
) -> None:
    (finding,) = _findings(site)
    assert finding.where == where
    assert says in finding.what
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        ("", None),
        ("allocation failure: Invalid account or account/partition combination", "account in"),
        ("allocation failure: Invalid qos specification", "qos in"),
        ("allocation failure: Requested node configuration is not available", "cpus_per_rank"),
        ("Invalid generic resource (gres) specification", "gpus and gpu_type"),
        ("Invalid feature specification", "constraint in"),
        ("Job violates accounting/QOS policy", "--nodes=2 --mem=0"),
    ],
)
def test_what_sbatch_refuses_is_told_with_the_setting_to_change(
    refusal: str, fix: str | None
) -> None:
    findings = check_refusal(refusal, ["--nodes=2", "--mem=0"]).findings
    assert [fix in finding.fix for finding in findings if fix] == [True] * bool(fix)
    assert [finding.what for finding in findings] == [refusal] * bool(refusal)


def test_a_job_that_may_not_be_requeued_is_found() -> None:
    assert check_job({"Requeue": "1"}).findings == ()
    (finding,) = check_job({"Requeue": "0"}).findings
    assert "may not be requeued" in finding.what
