"""What is refused before it is submitted, and what a person is told to do instead."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import checks, file_systems
from launch.slurm.client import NodeInfo, PartitionInfo
from launch.slurm.file_systems import file_system_of, require_shared
from launch.slurm.profile import Profile
from launch.slurm.submit import dependency_of, name_of
from pretrain.config import load_config
from pretrain.engines import extra
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def node(name: str, **fields: Any) -> NodeInfo:
    given = {"state": "IDLE", "cpus": 64, "gpus": 8, "partitions": ("gpu",)} | fields
    return NodeInfo(name=name, **given)


def partition(**fields: Any) -> PartitionInfo:
    given = {"name": "gpu", "is_default": True, "state": "UP", "fields": {}} | fields
    return PartitionInfo(**given)


NODES = [node(f"n{number}") for number in range(4)]
PROFILE = Profile(ranks_per_node=8, cpus_per_rank=8, gpus="gpus-per-node")


def test_an_unknown_partition_has_a_nearest_one() -> None:
    there = [partition(), partition(name="debug", is_default=False)]
    assert checks.partition_of(there, Profile()).name == "gpu"
    with pytest.raises(UserError, match=r"'gpus' is not known, did you mean gpu.*has: gpu, debug"):
        checks.partition_of(there, Profile(partition="gpus"))
    with pytest.raises(UserError, match="no default partition"):
        checks.partition_of(there[1:], Profile())


def test_auto_is_what_the_nodes_have() -> None:
    found = checks.resolve(Profile(), NODES)
    assert (found.ranks_per_node, found.cpus_per_rank, found.gpus) == (8, 8, "gpus-per-node")
    found = checks.resolve(Profile(), [node("n", gpus=0, cpus=16)])
    assert (found.ranks_per_node, found.cpus_per_rank, found.gpus) == (1, 16, "none")
    found = checks.resolve(Profile(gpus="none", ranks_per_node=3), NODES)
    assert (found.ranks_per_node, found.cpus_per_rank, found.gpus) == (3, 21, "none")
    mixed = [node("a", gpu_types=("a100",), gpus=4), node("h", gpu_types=("h100",))]
    assert checks.resolve(Profile(gpu_type="a100"), mixed).ranks_per_node == 4


@pytest.mark.parametrize(
    ("profile", "nodes", "members", "message"),
    [
        ({}, 5, NODES, "--nodes 5: partition gpu has 4; at most --nodes 4"),
        ({}, 3, NODES, "allows a job 2; at most --nodes 2"),
        ({"ranks_per_node": 9}, 1, NODES, "n0 has 8 GPUs: ranks_per_node can be so many, not 9"),
        ({"cpus_per_rank": 9}, 1, NODES, "has 64 CPUs, fewer than .* = 8 x 9: .* to 8 at most"),
        ({}, 1, [node("c", gpus=0)], "c has no GPUs that Slurm knows of: set gpus: none"),
        ({"gpu_type": "h100"}, 1, [node("c", gpu_types=("a100",))], "set gpu_type to a100"),
        ({"constraint": "ib"}, 1, NODES, "with the features ib has no nodes"),
    ],
)
def test_nodes_that_there_are_not(
    profile: dict[str, Any], nodes: int, members: list[NodeInfo], message: str
) -> None:
    asked = PROFILE.model_copy(update=profile)
    problem = checks.problem_of_nodes(partition(max_nodes=2), members, asked, nodes)
    if nodes == 5:
        problem = checks.problem_of_nodes(partition(), members, asked, nodes)
    assert problem
    assert re.search(message, problem)


def test_as_many_nodes_as_there_are() -> None:
    assert checks.problem_of_nodes(partition(), NODES, PROFILE, 4) is None
    # A node that is down now comes back: the job waits.
    down = [*NODES[1:], node("n0", state="DOWN")]
    assert checks.problem_of_nodes(partition(), down, PROFILE, 4) is None


@pytest.mark.parametrize("name", ["a/b", "/", "", " ", "a\nb", "a\0b", "x" * 201])
def test_names_that_are_none(name: str) -> None:
    assert checks.problem_of_name(name)


@pytest.mark.parametrize("name", ["first-run", "a b", "ü €", "$(x) '\"", "-x", "%x"])
def test_names(name: str) -> None:
    assert checks.problem_of_name(name) is None


@pytest.mark.parametrize("folder", ["a b", "x\ny", "$(x)", "ü/é", "...", "%j", "-"])
def test_a_run_directory_may_have_any_name(folder: str) -> None:
    name = name_of(RunDirectory(Path("/runs") / folder))
    assert checks.problem_of_name(name) is None


@pytest.mark.parametrize("path", ["/runs/50%", "/%j/x", "/a\\b"])
def test_paths_in_which_slurm_replaces_something(path: str) -> None:
    problem = checks.problem_of_path(Path(path))
    assert problem
    assert path in problem


def test_other_paths() -> None:
    assert checks.problem_of_path(Path("/a b/$(x)/\n'\";`ü€")) is None


@pytest.mark.parametrize(
    ("time", "profile", "message"),
    [
        ("soon", {}, "--time soon: must be minutes"),
        ("2-0", {}, "--time 2-0: partition gpu allows 1440 minutes"),
        ("5", {}, "asked to stop 300 s before it .* give it 7 minutes at least"),
        (None, {"time": "0:06:00"}, "--time 0:06:00: a job is asked"),
    ],
)
def test_time_limits_that_do_not_work(
    time: str | None, profile: dict[str, Any], message: str
) -> None:
    there = partition(max_time_s=86400)
    problem = checks.problem_of_time(there, PROFILE.model_copy(update=profile), time)
    assert problem
    assert re.search(message, problem)


def test_time_limits_that_work() -> None:
    there = partition(max_time_s=86400)
    assert checks.problem_of_time(there, PROFILE, "24:00:00") is None
    assert checks.problem_of_time(there, PROFILE, "7") is None
    assert checks.problem_of_time(there, PROFILE, None) is None
    assert checks.problem_of_time(partition(), PROFILE, None) is None


def test_accounts_and_qos_that_a_partition_does_not_take() -> None:
    there = partition(allowed_accounts=("physics",), denied_qos=("low",))
    asked = PROFILE.model_copy(update={"account": "physic", "qos": "low"})
    account, qos = checks.problems_of_access(there, asked)
    assert "takes physics, did you mean physics?" in account
    assert "QOS 'low': partition gpu does not take it" in qos
    assert not checks.problems_of_access(partition(), asked)


def test_a_container_needs_an_image_that_is_there(tmp_path: Path) -> None:
    asked = Profile.model_validate({"container": {"runtime": "pyxis"}})
    assert "container.image is not set" in checks.problems_of_container(asked)[0]
    asked = Profile.model_validate({"container": {"runtime": "pyxis", "image": "/no/such.sqsh"}})
    assert "no such file" in checks.problems_of_container(asked)[0]
    asked = Profile.model_validate({"container": {"runtime": "pyxis", "image": "nvcr.io#a:1"}})
    assert not checks.problems_of_container(asked)


@pytest.mark.parametrize(
    ("runtime", "path", "part"),
    [
        ("none", "/a,b: c^$", None),
        ("apptainer", "/a b/$c", None),
        ("apptainer", "/a,b", ","),
        ("apptainer", "/a^b", "^"),
        ("pyxis", "/a:b", ":"),
        ("pyxis", "/a b", " "),
        ("pyxis", "/$HOME", "$"),
    ],
)
def test_a_path_that_a_container_cannot_be_told(runtime: str, path: str, part: str | None) -> None:
    profile = Profile.model_validate({"container": {"runtime": runtime}})
    if part is None:
        checks.refuse_mounts({"checkpoint.dir": Path(path)}, profile)
        return
    told = f"checkpoint.dir, {path}: has {part!r}, which {runtime} does not take"
    with pytest.raises(UserError, match=re.escape(told)):
        checks.refuse_mounts({"checkpoint.dir": Path(path)}, profile)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7", "afterok:7"),
        ("7_3", "afterok:7_3"),
        ("afterany:7:8", "afterany:7:8"),
        ("singleton,afterok:7", "singleton,afterok:7"),
        (None, None),
    ],
)
def test_dependencies(text: str | None, wanted: str | None) -> None:
    assert dependency_of(text) == wanted


@pytest.mark.parametrize("text", ["", "x", "7 8", "afterok", "afterok:7;rm", "$(x)"])
def test_what_is_no_dependency(text: str) -> None:
    with pytest.raises(UserError, match="must be the number of a job"):
        dependency_of(text)


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:5 / /home rw - nfs4 server:/home rw
24 23 0:6 / /home/me/scratch rw - xfs /dev/sdb rw
25 22 0:7 / /with\\040space rw - lustre mds:/x rw
26 22 0:8 / /twice rw - tmpfs tmpfs rw
27 22 0:9 / /twice rw - gpfs gpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "mount"),
    [
        ("/tmp/x", "ext4", "/"),
        ("/home/me/x", "nfs4", "/home"),
        ("/home/me/scratch/x", "xfs", "/home/me/scratch"),
        ("/home/me/scratchpad", "nfs4", "/home"),
        ("/with space/x", "lustre", "/with space"),
        ("/twice/x", "gpfs", "/twice"),
    ],
)
def test_on_what_a_path_is(path: str, kind: str, mount: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == (kind, mount)


def test_a_folder_that_only_this_machine_sees() -> None:
    with pytest.raises(UserError, match=r"/tmp/x is on ext4 \(mounted at /\).*shared_paths: \[/\]"):
        require_shared("the run directory", Path("/tmp/x"), Profile(), MOUNTS)
    assert require_shared("it", Path("/home/me"), Profile(), MOUNTS) == "nfs4"
    assert require_shared("it", Path("/tmp/x"), Profile(shared_paths=("/tmp",)), MOUNTS) == "ext4"


def test_an_engine_has_to_be_installed_where_no_container_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(extra, "version", version)
    config = load_config("tiny-hybrid-moe", ["train.engine=megatron"])
    bare, boxed = Profile(), Profile.model_validate({"container": {"runtime": "pyxis"}})
    assert "megatron-core is not installed" in (checks.problem_of_engine(config, bare) or "")
    assert checks.problem_of_engine(config, boxed) is None
    assert checks.layout_of(config, 2, 2).startswith("layout on 4 ranks")


def test_a_layout_that_does_not_fit_the_nodes() -> None:
    config = load_config("tiny-hybrid-moe", ["parallel.tp=4", "train.global_batch=12"])
    assert checks.layout_of(config, 2, 2).startswith("layout on 4 ranks: pp=1")
    with pytest.raises(UserError, match=r"3 nodes x 2 ranks: layout refused.* works on 6 ranks"):
        checks.layout_of(config, 3, 2)


def test_nodes_need_all_that_a_run_reads_and_writes() -> None:
    settings = ["data.shards=/shards", "checkpoint.dir=/saved", "eval.sources=/held-out"]
    folders = file_systems.folders_of(load_config("tiny", [*settings, "eval.every=5"]))
    assert [str(path) for path in folders.values()] == ["/shards", "/held-out", "/saved"]
    # What is not evaluated is not read, and object stores and the sample are no folders.
    settings[1:2] = ["checkpoint.dir=s3://saved"]
    assert list(file_systems.folders_of(load_config("tiny", settings))) == ["data.shards = /shards"]
    settings = ["eval.sources=[{path: s3://a}, {path: /b}]", "eval.every=5"]
    folders = file_systems.folders_of(load_config("tiny", settings))
    assert list(folders) == ["eval.sources = /b"]
