"""Starts of a job, and a Slurm whose nodes and job are as a test says."""

import socket
from collections.abc import Sequence
from typing import Any

import pytest

from launch.slurm.client import JobInfo, NodeInfo, Slurm
from launch.slurm.job import Job, write_job
from launch.slurm.profile import Profile
from launch.slurm.start import Start
from pretrain.run_dir import RunDirectory

AN_AGE_AGO = "2026-01-01T00:00:00"

START = Start("7", 1, "gpu", ("n1", "n2"), (2, 2), "2026-11-27T10:00:00+00:00")


class Nodes(Slurm):
    """A Slurm that knows nodes and one job, and notes what is done to that.

    Attributes:
        avoided: what it was told to keep the job from, each time.
    """

    def __init__(self, nodes: Sequence[NodeInfo], job: JobInfo | None = None) -> None:
        self._nodes = nodes
        self._job = job
        self.requeued: list[str] = []
        self.avoided: list[list[str]] = []

    def requeue(self, job: str) -> None:
        self.requeued.append(job)

    def avoid(self, job: str, nodes: Sequence[str]) -> None:
        self.avoided.append(list(nodes))

    def job(self, job: str) -> JobInfo | None:
        return self._job

    def hostnames(self, nodes: str) -> tuple[str, ...]:
        return tuple(nodes.split(","))

    def nodes(self, names: str | None = None) -> list[NodeInfo]:
        return [node for node in self._nodes if names is None or node.name in names.split(",")]


def begun(run: RunDirectory, start: Start = START) -> int:
    attempt = run.new_attempt()
    start.note(run, attempt)
    return attempt


def job(**fields: Any) -> JobInfo:
    return JobInfo(id="7", **({"state": "COMPLETING", "restarts": 1} | fields))


def addresses(monkeypatch: pytest.MonkeyPatch, known: dict[str, str]) -> None:
    def look_up(name: str, *_: object) -> list[Any]:
        if name not in known:
            raise socket.gaierror
        return [(None, None, None, "", (known[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def submitted(run: RunDirectory, profile: Profile) -> None:
    write_job(
        run,
        Job(
            recipe="tiny",
            name="x",
            nodes=2,
            ranks_per_node=1,
            profile_name="site",
            profile=profile,
            python="python",
        ),
    )


def three_nodes() -> list[NodeInfo]:
    return [NodeInfo(name=f"n{i}", state="IDLE", partitions=("gpu",)) for i in (1, 2, 3)]
