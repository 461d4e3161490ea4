"""Profiles of sites, and what is refused in them."""

from pathlib import Path

import pytest

from launch.slurm.profile import load_profile, parse_profile, profile_names, seconds_of
from pretrain.errors import UserError


def test_the_shipped_profiles() -> None:
    assert profile_names() == ["aws-efa", "generic", "local-sandbox", "nvidia-h100-ib"]


def test_a_profile_extends_another_one(tmp_path: Path) -> None:
    base, site = tmp_path / "base.yaml", tmp_path / "site.yaml"
    base.write_text("extends: nvidia-h100-ib\npartition: gpu\nnetwork: {interface: eth0}\n")
    site.write_text("extends: base.yaml\naccount: me\nenvironment:\n  A: {value: '1', why: so}\n")
    profile = load_profile(str(site))
    shipped = load_profile("nvidia-h100-ib")
    assert (profile.partition, profile.account, profile.gpus) == ("gpu", "me", shipped.gpus)
    assert (profile.network.interface, profile.network.hcas) == ("eth0", shipped.network.hcas)
    assert set(profile.environment) == {*shipped.environment, "A"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"partitoin": "x"}, "partitoin is not a setting, did you mean partition?"),
        ({"network": {"hca": "x"}}, "network.hca is not a setting, did you mean network.hcas?"),
        ({"gpus": "gpu"}, "'none', 'gpus-per-node', 'gpus-per-task' or 'gres'"),
        ({"ranks_per_node": 0}, "greater than or equal to 1"),
        ({"ranks_per_node": True}, "must be an integer, not true or false"),
        ({"time": "soon"}, "must be minutes, or H:MM:SS, or days-hours"),
        ({"partition": "a\nb"}, "must be one line of text"),
        ({"environment": {"A B": {"value": "1", "why": "x"}}}, "name of an environment variable"),
        ({"environment": {"A": {"value": "1"}}}, "environment.A.why"),
        ({"environment": {"WANDB_API_KEY": {"value": "1", "why": "x"}}}, "export it before you"),
        ({"options": ["-N 2"]}, "must be a long option with its value"),
        ({"options": ["--job-name=a/b"]}, "--job-name is set by farspan"),
        ({"options": ["--partition=gpu"]}, "--partition is set by farspan, from the other"),
        ({"options": ["--exclude=/site/bad"]}, "sbatch would take it for a file: name the nodes"),
        ({"scratch": "/tmp/{usr}"}, "in which {user} and {job} may stand"),
        ({"shared_paths": ["home"]}, "must be an absolute path"),
        ({"container": {"runtime": "docker"}}, "'none', 'pyxis' or 'apptainer'"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(tree: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_profile(tree, "site.yaml")
    assert str(error.value).startswith("profile site.yaml: ")
    assert message in str(error.value)


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean generic"):
        load_profile("generc")
    with pytest.raises(UserError, match="no such file"):
        load_profile("a/b.yaml")
    with pytest.raises(UserError, match="is not known"):
        load_profile("a/b")
    circle = tmp_path / "circle.yaml"
    circle.write_text("extends: circle.yaml\n")
    with pytest.raises(UserError, match="in a circle"):
        load_profile(str(circle))
    circle.write_text("partition\n")
    with pytest.raises(UserError, match="must hold a mapping"):
        load_profile(str(circle))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-0:0:1", 86401),
    ],
)
def test_time_limits_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "-1", "1-"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        seconds_of(text)
