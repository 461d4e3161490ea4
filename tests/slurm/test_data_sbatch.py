"""Jobs of a data run end with the bytes of one process, whatever is lost on the way."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.rates import read_totals
from data_pipeline.recipe import SHIPPED, load_recipe
from data_pipeline.run import run
from data_pipeline.sample import make_sample_crawl
from data_pipeline.shards import load_manifest
from launch.data_state import read_data_state
from launch.slurm.client import JobInfo, Slurm
from slurm.sandbox.cluster import Cluster
from tests.files import contents
from tests.ranks import ROOT, TIMEOUT_S

pytestmark = pytest.mark.slow

# Of a folder or a file: nothing of it may ever be read by a shell, or by Slurm.
HOSTILE = 'it\'s "a" $(touch hurt) `touch hurt`\n; %j %a & ü=1,2'
STAGES = ("clean", "dedup", "shards", "finish")
RECIPE = f"recipe {HOSTILE}.yaml"
PROFILE = f"profile {HOSTILE}.yaml"
PARTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a crawl of six archives, a recipe and a profile."""
    folder = tmp_path_factory.mktemp("data")
    make_sample_crawl(folder / HOSTILE, pages=240, files=6, seed=5)
    (folder / RECIPE).write_bytes((SHIPPED / "demo.yaml").read_bytes())
    # Without accounts Slurm takes any.
    (folder / PROFILE).write_text("extends: local-sandbox\naccount: $(touch hurt) 'a' \"b\"\n")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """What one process makes of it."""
    recipe = load_recipe(str(folder / RECIPE))
    run([str(folder / HOSTILE)], folder / "whole", recipe, vocab_size=600)
    return contents(folder / "whole")


@dataclass
class Data:
    """A folder that jobs fill."""

    cluster: Cluster
    folder: Path
    name: str

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name} {HOSTILE}"

    def submit(self, *options: str, code: int = 0) -> str:
        """What `farspan data run --engine slurm` prints."""
        farspan = [sys.executable, "-m", "launch.cli", "data", "run", HOSTILE]
        farspan += ["--recipe", RECIPE, "--vocab-size", "600", "--out", self.out.name]
        farspan += ["--engine", "slurm", "--tasks", str(PARTS), "--profile", PROFILE, *options]
        done = subprocess.run(
            farspan,
            env=self.cluster.environment() | {"PYTHONPATH": str(ROOT)},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def jobs(self, *numbers: str) -> list[JobInfo]:
        return Slurm(self.cluster.environment()).jobs(numbers)

    def state(self, number: str) -> str:
        return self.jobs(number)[0].state

    def log(self, name: str) -> str:
        path = self.out / "slurm" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S / 4
        while not condition():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.2)

    def wait_for(self, *numbers: str) -> None:
        self.wait_until(lambda: all(info.is_over for info in self.jobs(*numbers)))

    def printed(self) -> str:
        logs = sorted((self.out / "slurm").glob("*.log"))
        return self.cluster.status() + "\n".join(
            f"{path.name}:\n{path.read_text()}" for path in logs
        )

    def check(self, whole: dict[str, bytes]) -> None:
        """The folder has the bytes of one process, and nothing was taken for a command."""
        made = {
            name: data for name, data in contents(self.out).items() if not name.startswith("slurm/")
        }
        assert made == whole, self.printed()
        assert not list(self.folder.rglob("hurt"))
        assert not list((self.out / "slurm").glob("done-*"))
        assert not list((self.out / "slurm").glob("starts-*"))


def _submitted(printed: str) -> dict[str, str]:
    """The numbers of jobs by what they do."""
    return {stage: job for job, stage in re.findall(r"submitted job (\d+): (\w+)", printed)}


def test_two_tasks_are_killed_and_the_same_command_does_those_alone(
    cluster: Cluster, folder: Path, whole: dict[str, bytes]
) -> None:
    data = Data(cluster, folder, "killed")
    jobs = _submitted(data.submit())
    assert tuple(jobs) == STAGES
    array = jobs["clean"]
    for part, step in ((1, ""), (3, ".0")):
        data.wait_until(lambda part=part: "clean: 0 of 2" in data.log(f"clean-{part}"))
        cluster.call("scancel", f"{array}_{part}{step}")
    data.wait_for(*jobs.values())
    states = {info.task: info.state for info in data.jobs(array)}
    assert states == {1: "CANCELLED", 2: "COMPLETED", 3: "FAILED"}
    assert [data.state(jobs[stage]) for stage in STAGES[1:]] == ["CANCELLED"] * 3
    told = read_data_state(data.out, Slurm(cluster.environment()))
    assert (told.state, told.stage, told.cleaned) == ("failed", "clean", 2)
    assert told.parts == {"done": 1, "failed": 2}
    assert len(told.failures) == 5

    again = data.submit()
    assert "2 of 6 archives are cleaned" in again
    assert f"clean part 1 of 3 (job {array}_1): CANCELLED" in again
    assert f"clean part 3 of 3 (job {array}_3): FAILED, exit code 137; see " in again
    assert f"dedup (job {jobs['dedup']}): cancelled, because a job before it has failed" in again
    jobs = _submitted(again)
    assert f"job {jobs['clean']}: clean, parts 1,3 of 3" in again
    data.wait_for(*jobs.values())
    assert {info.task: info.state for info in data.jobs(jobs["clean"])} == {
        1: "COMPLETED",
        3: "COMPLETED",
    }
    assert data.log("clean-2").count("cleaned part 2/3, 2 archives") == 1
    data.check(whole)
    cleaned, *_ = read_totals(data.out)
    funnel = load_manifest(data.out).extra["funnel"]
    assert cleaned["data/documents"] == sum(row["documents"] for row in funnel)
    assert cleaned["data/attempts"] == PARTS + 2
    assert "is finished already: same inputs, same options" in data.submit()


def test_lines_submitted_by_hand_and_a_task_stopped_and_a_node_lost(
    cluster: Cluster, folder: Path, whole: dict[str, bytes]
) -> None:
    data = Data(cluster, folder, "by hand")
    lines = data.submit("--prepare-only")
    script = (
        "\n".join(re.split(r"(?m)^(?=clean=)", lines)[1:]) + "\necho $clean $dedup $shards $finish"
    )
    jobs = dict(zip(STAGES, cluster.call("bash", "-c", script).split(), strict=True))
    for part in (1, 3):
        data.wait_until(lambda part=part: "clean: 0 of 2" in data.log(f"clean-{part}"))
    tasks = {info.task: info for info in data.jobs(jobs["clean"])}
    # Two of them fill a node.
    assert tasks[1].nodes != tasks[3].nodes
    cluster.call("scancel", "--signal=TERM", f"{jobs['clean']}_1")
    cluster.kill_node(int(tasks[3].nodes[0].removeprefix("node")))
    data.wait_for(*jobs.values())
    assert data.state(jobs["finish"]) == "COMPLETED", data.printed()
    tasks = {info.task: info for info in data.jobs(jobs["clean"])}
    assert "stopped; the same command continues" in data.log("clean-1")
    assert tasks[1].restarts >= 1
    assert tasks[3].restarts >= 1
    data.check(whole)


def test_what_this_cluster_cannot_do_is_refused_before_anything_is_submitted(
    cluster: Cluster, folder: Path
) -> None:
    data = Data(cluster, folder, "refused")
    for options, told in (
        (["--time", "2"], "--time 2: a job is asked to stop 30 s before it (stop_before_s)"),
        (["--time", "$(touch hurt)"], r"--time $(touch hurt): must be minutes, or H:MM:SS"),
        (["--out", "back\\slash"], "has a backslash, which Slurm gives a meaning"),
        (["--profile", "locl-sandbox"], "did you mean local-sandbox?"),
        (["--profile", "generic"], "--out is not on a shared file system: "),
        (["--workers", "3"], "--workers 3: no node of partition main has more than 2 CPUs"),
    ):
        assert told in data.submit(*options, code=2)
    assert not data.out.exists()
    assert not cluster.call("squeue", "--noheader")
