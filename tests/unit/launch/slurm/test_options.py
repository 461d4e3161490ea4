"""What each shipped profile makes of a job: golden/PROFILE.txt, to be read when one changes."""

from pathlib import Path

import pytest

from launch.environment import describe, environment_of_ranks
from launch.slurm.checks import resolve
from launch.slurm.client import NodeInfo, Slurm
from launch.slurm.options import sbatch_options
from launch.slurm.profile import Profile, Setting, load_profile, profile_names

GOLDEN = Path(__file__).parent / "golden"
# Two words, quotes, a command, a pattern, a line break, and letters that are not ASCII.
HOSTILE = "a b\"c'd $(touch pwned) `touch pwned` %j *; \\ \n € ü"


@pytest.mark.parametrize("name", profile_names())
def test_the_parameters_of_a_profile(name: str) -> None:
    nodes = [
        NodeInfo(name=f"n{i}", state="IDLE", cpus=192, gpus=8, partitions=("gpu",))
        for i in range(4)
    ]
    profile = resolve(load_profile(name), nodes)
    assert isinstance(profile.ranks_per_node, int)
    assert isinstance(profile.cpus_per_rank, int)
    options = sbatch_options(
        profile,
        name="first-run",
        nodes=2,
        folder=Path("/shared/runs/first-run"),
        dependency="afterok:7",
        exclude=["n3"],
    )
    variables = environment_of_ranks(
        ranks=2 * profile.ranks_per_node,
        ranks_here=profile.ranks_per_node,
        address="n0",
        port=20049,
        cpus=profile.cpus_per_rank,
        attempt=1,
        profile=profile,
        scratch=profile.scratch and profile.scratch.replace("{user}", "me"),
        inherited={},
    )
    rendered = "\n".join(["sbatch", *options]) + f"\n\nranks\n{describe(variables)}\n"
    assert rendered == (GOLDEN / f"{name}.txt").read_text()


def test_a_profile_for_each_golden_file() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == profile_names()


def test_nodes_that_a_site_excludes_and_those_that_are_avoided() -> None:
    profile = Profile(options=("--exclude=n[7-8]", "--switches=1"), ranks_per_node=8)
    asked = {"name": "x", "nodes": 1, "folder": Path("/x")}
    options = sbatch_options(profile, **asked, exclude=["n3"])  # type: ignore[arg-type]
    assert [one for one in options if "exclude" in one] == ["--exclude=n[7-8],n3"]
    assert "--switches=1" in options
    options = sbatch_options(profile, **asked)  # type: ignore[arg-type]
    assert [one for one in options if "exclude" in one] == ["--exclude=n[7-8]"]


@pytest.mark.parametrize(
    "field", ["partition", "account", "qos", "constraint", "reservation", "gpu_type", "memory"]
)
def test_a_value_of_a_profile_is_one_argument_whatever_is_in_it(field: str) -> None:
    value = HOSTILE.replace("\n", "")
    profile = Profile.model_validate({"gpus": "gres", "ranks_per_node": 8, field: value})
    options = sbatch_options(profile, name="x", nodes=1, folder=Path("/x"))
    plain = sbatch_options(
        profile.model_copy(update={field: "gpu"}), name="x", nodes=1, folder=Path("/x")
    )
    assert [option.replace(value, "gpu") for option in options] == plain
    assert sum(value in option for option in options) == 1


def test_what_sbatch_gets_is_what_was_meant(tmp_path: Path) -> None:
    """Names, folders, options, arguments and variables, through a program that is called sbatch."""
    for name in ("sbatch", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        told = 'printf "%s\\0" "$FARSPAN_PYTHON" "$@" >"$TOLD"; echo "42;cluster"'
        program.write_text(f"#!/bin/bash\n{told}\n")
        program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "TOLD": str(tmp_path / "told")}
    options = sbatch_options(
        Profile(options=(f"--switches={HOSTILE}".replace("\n", ""),), ranks_per_node=1),
        name=HOSTILE,
        nodes=1,
        folder=Path(f"/{HOSTILE}"),
        dependency=HOSTILE,
    )
    slurm = Slurm(environment)
    number = slurm.submit(tmp_path / HOSTILE, options, [HOSTILE], {"FARSPAN_PYTHON": HOSTILE})
    python, *told = (tmp_path / "told").read_bytes().decode().split("\0")[:-1]
    assert number == "42"
    assert python == HOSTILE
    assert told[:2] == ["--parsable", "--export=ALL"]
    assert told[3:] == [*options, str(tmp_path / HOSTILE), HOSTILE]
    assert f"--job-name={HOSTILE}" in told
    assert not list(tmp_path.rglob("pwned"))


def test_a_variable_of_a_profile_is_what_was_meant() -> None:
    profile = Profile(environment={"NCCL_IB_HCA": Setting(value=HOSTILE, why="it is")})
    variables = environment_of_ranks(
        ranks=1, ranks_here=1, address="n", port=1, profile=profile, inherited={}
    )
    assert [one.value for one in variables if one.name == "NCCL_IB_HCA"] == [HOSTILE]
