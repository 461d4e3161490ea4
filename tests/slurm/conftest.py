"""A real Slurm of two nodes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT, TIMEOUT_S

SANDBOX = ROOT.parent / "shared" / "tools" / "slurm_sandbox"
NEEDS = ("sbatch", "slurmctld", "slurmd", "munged")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch reaches a cluster of two nodes."""
    if not SANDBOX.exists():
        pytest.skip(f"no {SANDBOX} to start a cluster with")
    if not all(map(shutil.which, NEEDS)):
        pytest.skip(f"Slurm is not installed ({', '.join(NEEDS)})")
    # Sockets of Slurm lie in it, whose paths may have 108 characters; that of a test is long.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    script = tmp_path / "slurm_sandbox"
    shutil.copy(SANDBOX, script)
    start = ["bash", str(script), "start", str(folder), "--nodes", "2", "--cpus", "1"]
    subprocess.run(start, check=True, timeout=TIMEOUT_S)
    try:
        yield os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
    finally:
        subprocess.run(["bash", str(script), "stop", str(folder)], check=True, timeout=TIMEOUT_S)
        shutil.rmtree(folder, ignore_errors=True)
