"""An array of jobs that clean and one that does the rest give the bytes of one process."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.recipe import load_recipe
from data_pipeline.run import run
from data_pipeline.sample import make_sample_crawl
from slurm.sandbox.cluster import Cluster
from tests.files import contents
from tests.ranks import ROOT, TIMEOUT_S

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "slurm" / "data.sbatch"


def _wait_until(condition: Callable[[], bool], logs: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        printed = "".join(path.read_text() for path in logs.glob("farspan-data-*.log"))
        assert time.monotonic() < deadline, printed
        time.sleep(0.2)


def test_an_array_one_part_of_which_is_stopped_and_the_job_behind_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    make_sample_crawl(tmp_path / "crawl", pages=160, files=6, seed=5)
    run([str(tmp_path / "crawl")], tmp_path / "whole", load_recipe("demo"), vocab_size=600)

    def call(*command: str) -> str:
        return subprocess.check_output(
            command, env=cluster.environment(), text=True, cwd=tmp_path, timeout=TIMEOUT_S
        )

    def field(job: str, name: str) -> str:
        return dict(re.findall(r"(\w+)=(\S+)", call("scontrol", "show", "job", job)))[name]

    def submit(*options: str) -> str:
        out = ["crawl", "--out", "data", "--recipe", "demo", "--vocab-size", "600"]
        return call("sbatch", "--parsable", *options, str(SCRIPT), *out).strip()

    array = submit("--array=1-2")
    rest = submit(f"--dependency=afterany:{array}")
    log = tmp_path / f"farspan-data-{array}-1.log"
    _wait_until(lambda: log.exists() and "clean: 0 of 3" in log.read_text(), tmp_path)
    call("scancel", "--signal=TERM", f"{array}_1")
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    _wait_until(lambda: field(rest, "JobState") in ended, tmp_path)
    printed = "".join(path.read_text() for path in tmp_path.glob("farspan-data-*.log"))
    assert field(rest, "JobState") == "COMPLETED", printed
    assert "stopped; the same command continues" in log.read_text()
    assert field(f"{array}_1", "Restarts") == "1"
    assert "cleaned part 1/2, 3 archives" in log.read_text()
    assert "clean: 6 of 6" in printed
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
