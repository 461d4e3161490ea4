"""`farspan launch slurm` on commands that stand for those of Slurm."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import file_systems
from launch.slurm.excludes import exclude
from launch.slurm.job import read_job
from launch.slurm.submit import SCRIPT, Request, resubmit, submit_run
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

PARTITION = "PartitionName=gpu\n   Default=YES MaxTime=1-00:00:00\n   Nodes=n1\n   State=UP\n"
NODE = "NodeName={name} Arch=x\n   CPUTot=2\n   State=IDLE\n   Partitions=gpu\n"
SCONTROL = f"""
case "$2" in
  config) [[ $CLUSTER ]] && echo "ClusterName = $CLUSTER" ;;
  partition) printf '{PARTITION}' ;;
  node) for name in n1 n2 n3; do printf "{NODE.format(name="$name")}"; done ;;
  job) echo "Invalid job id specified" >&2; exit 1 ;;
esac
"""
SBATCH = """
if [[ $1 == --test-only ]]; then
  echo "${REFUSAL:-sbatch: Job 9 to start at once}" >&2
  exit ${REFUSAL:+1}
fi
printf "%s\\0" "$FARSPAN_PYTHON" "$@" >"$SUBMITTED"
echo 42
"""


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What sbatch was told last, its interpreter first; nothing if it was not called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("scontrol", SCONTROL), ("sbatch", SBATCH), ("sacct", "exit 1")):
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    told = tmp_path / "submitted"
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SUBMITTED", str(told))
    monkeypatch.setenv("CLUSTER", "here")
    return lambda: told.read_text().split("\0")[:-1] if told.exists() else []


def request(shards: Path, tmp_path: Path, *overrides: str, **fields: object) -> Request:
    given = {
        "recipe": "tiny",
        "overrides": [f"data.shards={shards}", *overrides],
        "nodes": 2,
        "profile": "local-sandbox",
        "run_dir": tmp_path / "run",
    } | fields
    return Request(**given)  # type: ignore[arg-type]


def test_a_job_is_submitted_once_its_run_directory_is_there(
    submitted: Callable[[], list[str]], shards: Path, tmp_path: Path
) -> None:
    submit_run(request(shards, tmp_path, "train.steps=3", name="first", dependency="7", time="10"))
    run = RunDirectory(tmp_path / "run")
    python, *told = submitted()
    assert python == sys.executable
    assert told[-2:] == [str(SCRIPT), str(run.root)]
    options = {"--job-name=first", "--nodes=2", "--time=10", "--dependency=afterok:7"}
    assert options < set(told)
    job = read_job(run)
    assert job
    assert [submission.id for submission in job.submissions] == ["42"]
    assert (job.ranks, job.overrides[-1], job.profile_name) == (4, "train.steps=3", "local-sandbox")
    assert run.config.exists()

    exclude(run, "n2", "it is broken", 3600)
    run.cancelled.touch()
    resubmit(run)
    again = submitted()[1:]
    assert "--exclude=n2" in again
    assert "--dependency=afterok:7" not in again
    assert not run.cancelled.exists()
    job = read_job(run)
    assert job
    assert [submission.why for submission in job.submissions] == ["submitted", "resubmitted"]
    # Of three nodes two have to be left.
    exclude(run, "n3", "it is broken", 3600)
    resubmit(run)
    assert "--exclude=n3" in submitted()


def test_nodes_that_the_profile_excludes_are_no_others(
    submitted: Callable[[], list[str]], shards: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("extends: local-sandbox\noptions: ['--exclude=n3']\n")
    submit_run(request(shards, tmp_path, profile=str(site)))
    # Of three nodes two have to be left.
    exclude(run := RunDirectory(tmp_path / "run"), "n2", "it is broken", 3600)
    resubmit(run)
    assert "--exclude=n3" in submitted()


def test_a_job_of_before_keeps_options_that_new_profiles_may_not_have(
    submitted: Callable[[], list[str]], shards: Path, tmp_path: Path
) -> None:
    submit_run(request(shards, tmp_path))
    run = RunDirectory(tmp_path / "run")
    tree = json.loads(run.job.read_text())
    tree["profile"]["options"] = ["--qos=high"]
    run.job.write_text(json.dumps(tree))
    resubmit(run)
    assert "--qos=high" in submitted()


def test_a_job_before_on_another_cluster_is_pointed_out(
    submitted: Callable[[], list[str]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submit_run(request(shards, tmp_path))
    resubmit(run := RunDirectory(tmp_path / "run"))
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setenv("CLUSTER", "there")
    resubmit(run)
    told = capsys.readouterr().err
    assert told.startswith("warning: job 42 of this run is one of the cluster here, and there does")
    resubmit(run)
    assert "warning" not in capsys.readouterr().err
    # A cluster that does not tell its name takes jobs all the same.
    monkeypatch.setenv("CLUSTER", "")
    resubmit(run)
    job = read_job(run)
    assert job
    assert [submission.cluster for submission in job.submissions[-2:]] == ["there", ""]


def test_a_dry_run_shows_everything_and_changes_nothing(
    submitted: Callable[[], list[str]],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submit_run(request(shards, tmp_path), dry_run=True)
    printed = capsys.readouterr().out
    assert "ok       partition gpu: 3 nodes, 3 usable now; 2 x 2 ranks" in printed
    assert "ok       Slurm: Job 9 to start at once" in printed
    assert "--nodes=2" in printed
    assert SCRIPT.read_text() in printed
    assert not submitted()
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_submitted(
    submitted: Callable[[], list[str]],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = request(shards, tmp_path, "parallel.tp=5", nodes=4, time="2-0", name="a/b")
    for dry_run in (False, True):
        with pytest.raises(UserError) as error:
            submit_run(wrong, dry_run)
        for what in ("name 'a/b': has a slash", "at most --nodes 3", "allows 1440", "Nearest that"):
            assert what in str(error.value)
    assert "refused  name 'a/b'" in capsys.readouterr().out
    with pytest.raises(UserError, match="no-shards"):
        submit_run(request(tmp_path / "no-shards", tmp_path), dry_run=True)
    assert not submitted()
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_the_nodes_do_not_see(
    submitted: Callable[[], list[str]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(file_systems, "file_system_of", lambda path, mounts: ("xfs", "/"))
    with pytest.raises(UserError, match="the run directory is not on a shared file system"):
        submit_run(request(shards, tmp_path, profile="generic"))
    assert not submitted()


def test_what_slurm_itself_would_refuse(
    submitted: Callable[[], list[str]],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REFUSAL", "allocation failure: Invalid qos specification")
    with pytest.raises(UserError, match=r"Slurm would refuse the job: .*Invalid qos"):
        submit_run(request(shards, tmp_path))
    assert not submitted()
    assert not (tmp_path / "run").exists()
    # As it says of a job that asks for more than there is, and of one whose nodes are down.
    monkeypatch.setenv("REFUSAL", "Requested node configuration is not available")
    with pytest.raises(UserError, match="Slurm would refuse the job"):
        submit_run(request(shards, tmp_path))
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("State=IDLE", "State=DOWN*"))
    submit_run(request(shards, tmp_path))
    assert submitted()


def test_what_was_never_submitted_cannot_be_submitted_again(
    submitted: Callable[[], list[str]], tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="was never submitted by farspan"):
        resubmit(run)
    run.job.write_text(json.dumps({"recipe": "tiny"}))
    with pytest.raises(UserError, match=r"cannot be read .*remove it, and submit"):
        resubmit(run)
