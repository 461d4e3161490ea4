"""A real Slurm of four nodes, which the tests of a file share."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm.sandbox import network, programs
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.settings import Settings

# On every node: two ranks of one core each.
SETTINGS = Settings(nodes=4, cpus=2, gpus=2)


@contextmanager
def started_cluster(settings: Settings = SETTINGS) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts; its processes find the environment's farspan.

    The test is skipped where there is no Slurm, or fails if this is CI, which installs it.
    """
    if missing := programs.missing():
        lacks(f"Slurm is not installed: no {', '.join(missing)} ({programs.INSTALL})")
    if settings.named() and os.getuid() != 0:
        lacks("host names and networks of nodes need root")
    # Sockets of Slurm lie in it, whose paths may have 107 characters; that of a test is long.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            cluster.start(settings)
        except network.RefusedError as error:
            pytest.skip(str(error))
        try:
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(cluster.folder)


def lacks(what: str) -> None:
    """Skip the test for what this machine lacks; in CI that is a failure."""
    if os.environ.get("FARSPAN_CI") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    with started_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster on which nothing runs yet, and whose nodes are all there."""
    yield shared_cluster
    shared_cluster.reset()
