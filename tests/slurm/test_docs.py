"""The commands of docs/slurm.md, as they stand there."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from data_pipeline.sample import make_sample_crawl
from launch.slurm.options import REQUEUE
from launch.slurm.profile import load_profile
from slurm.sandbox import programs
from slurm.sandbox.settings import Settings
from tests.ranks import ROOT, TIMEOUT_S
from tests.slurm.conftest import lacks, started_cluster

PAGE = (ROOT / "docs" / "slurm.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run(script: str, folder: Path, prefix: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [*prefix, "bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_profile_on_the_page_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "site.yaml").write_text(text)
    profile = load_profile(str(tmp_path / "site.yaml"))
    assert profile.partition == yaml.safe_load(text)["partition"]
    assert profile.memory == "0", "it extends another"


def test_jobs_that_are_submitted_by_hand_may_be_requeued() -> None:
    """Whatever SBATCH_NO_REQUEUE says, which beats what a batch script says."""
    pages = [PAGE, *(path.read_text() for path in (ROOT / "slurm").glob("*.sbatch"))]
    commands = re.findall(r"\bsbatch (-.*) slurm/(\w+)\.sbatch", "\n".join(pages))
    assert {script for _, script in commands} == {"train", "data"}
    assert [options for options, _ in commands if REQUEUE not in options.split()] == []


@pytest.mark.slow
def test_an_account_gets_to_a_job_on_two_nodes(tmp_path: Path) -> None:
    *on_a_cluster, _ = blocks("sh")
    # CI has installed it in its own way, from its own clone.
    lines = [
        line
        for line in "".join(on_a_cluster).splitlines()
        if not line.startswith(("git clone", "make install"))
    ]
    # All nodes are this machine.
    site = next(line for line in lines if "> site.yaml" in line)
    lines.insert(lines.index(site) + 1, "echo 'shared_paths: [/]' >>site.yaml")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    make_sample_crawl(tmp_path / "demo" / "crawl", pages=20, files=2, seed=1)
    partition = "PartitionName=gpu Nodes=ALL"
    settings = Settings(nodes=2, cpus=1, gpus=0, netns=True, conf=[partition])
    with started_cluster(settings) as cluster:
        printed = run("\n".join(lines), tmp_path, cluster.command(), cluster.environment())
        deadline = time.monotonic() + TIMEOUT_S
        while cluster.call("squeue", "--noheader"):
            assert time.monotonic() < deadline, cluster.status()
            time.sleep(0.2)
    assert "nothing found that should be mended" in printed
    for name in ("first", "by-hand"):
        assert (tmp_path / "runs" / name / "done.json").exists(), printed


@pytest.mark.slow
def test_a_cluster_on_a_laptop_loses_a_node(tmp_path: Path) -> None:
    if missing := programs.missing():
        lacks(f"Slurm is not installed: no {', '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    script = blocks("sh")[-1].replace("/tmp/cluster", str(folder))
    stop = script.splitlines()[-1]
    try:
        printed = run(script, tmp_path, [], dict(os.environ))
    finally:
        # Also where a line before it has failed.
        run(stop, tmp_path, [], dict(os.environ))
        shutil.rmtree(folder)
    assert (tmp_path / "runs" / "laptop" / "done.json").exists()
    assert re.search("^excluded .*node1", printed, re.MULTILINE), printed
