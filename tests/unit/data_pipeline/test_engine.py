"""A Ray cluster gives the bytes of this machine's processes, also when it loses workers."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.engine import open_engine
from data_pipeline.errors import DataError
from data_pipeline.ray_engine import pack
from data_pipeline.sample import make_sample_crawl
from pretrain.errors import STOPPED_ON_REQUEST
from tests.files import contents
from tests.ranks import ROOT, TIMEOUT_S

STORE_BYTES = 80 << 20  # the least that Ray allows
FILES = 4
WITH_ROOT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("name", ["dask", "ray=", "native=2", "Ray"])
def test_another_engine_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"engine={name} is not allowed: it is native, ray or ray="):
        open_engine(name)


def _do_in_a_worker(mark: Path, task: Any, *arguments: Any) -> Exception | None:
    """The exception of a task that a worker of a cluster is given."""
    content = pack(7, mark, partial(int, 0), task, arguments)
    command = [sys.executable, "-m", "data_pipeline.ray_engine"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as worker:
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write(len(content).to_bytes(8, "big") + content)
        worker.stdin.flush()
        number, error = pickle.load(worker.stdout)
        assert worker.wait() == 0
    assert number == 7
    return error


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    assert _do_in_a_worker(tmp_path / "mark", os.mkdir, str(tmp_path / "made")) is None
    assert (tmp_path / "made").is_dir()
    error = _do_in_a_worker(tmp_path / "no" / "mark", os.mkdir, str(tmp_path / "other"))
    assert isinstance(error, DataError)
    assert re.fullmatch(rf"{tmp_path}/no: .* does not see it .*; choose an --out on .*", str(error))
    assert not (tmp_path / "other").exists()


def test_a_worker_has_the_relative_paths_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mark").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _do_in_a_worker(tmp_path / "mark", os.mkdir, "made") is None
    assert (tmp_path / "here" / "made").is_dir()
    (tmp_path / "here" / "made").rmdir()
    (tmp_path / "here").rmdir()
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "here")  # there, but not for the worker
    error = _do_in_a_worker(tmp_path / "mark", os.mkdir, "made")
    assert isinstance(error, DataError)
    assert re.fullmatch(rf"{tmp_path}/here: .* does not see it .*; start the .*", str(error))


def test_what_a_worker_lived_for_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    content = pack(7, tmp_path / "mark", partial(int, 0), signal.sigwait, ([signal.SIGUSR1],))
    worker = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.ray_engine"], stdin=subprocess.PIPE, cwd=ROOT
    )
    assert worker.stdin
    worker.stdin.write(len(content).to_bytes(8, "big") + content)
    worker.stdin.close()
    assert worker.wait(TIMEOUT_S) == 1


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crawl")
    make_sample_crawl(folder, pages=160, files=FILES, seed=3)
    return folder


@pytest.fixture(scope="module")
def native(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("native") / "data"
    subprocess.run(_command(crawl, out, "native"), check=True, cwd=ROOT, timeout=TIMEOUT_S)
    return contents(out)


# So small a crawl has several shards, too.
FARSPAN = """
import data_pipeline.run
from launch.cli import main

data_pipeline.run.TOKENS_PER_SHARD = 100_000
main()
"""


def _command(crawl: Path, out: Path, engine: str) -> list[str]:
    farspan = [sys.executable, "-c", FARSPAN, "data", "run", str(crawl), "--out", str(out)]
    return [*farspan, "--recipe", "demo", "--vocab-size", "600", "--engine", engine]


def _ancestors(pid: int) -> list[int]:
    """Its parent, the parent of that, and so on."""
    found = []
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.partition("PPid:")[2].split()[0])
        found.append(pid)
    return found


def _title(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


class _Cluster:
    """Two nodes of one processor each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add_node()

    @property
    def engine(self) -> str:
        return f"ray={self._cluster.address}"

    def add_node(self) -> None:
        self._second = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        self._cluster.wait_for_nodes()

    def kill_node(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    @staticmethod
    def kill_worker() -> None:
        """Kill one that has a task at work."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for entry in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    is_task = b"data_pipeline.ray_engine" in (entry / "cmdline").read_bytes()
                    above = _ancestors(int(entry.name)) if is_task else []
                    # Not the copy of itself that the task is done in.
                    if os.getpid() in above and _title(above[0]).startswith(b"ray::"):
                        os.kill(above[0], signal.SIGKILL)
                        return
        raise AssertionError("no worker has a task at work")

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[_Cluster]:
    cluster = _Cluster()
    yield cluster
    cluster.stop()


def _run_and(loss: Any, crawl: Path, out: Path, engine: str, stage: str = "", code: int = 0) -> str:
    """Run on a cluster, let `loss` happen after the first task of a stage; what was printed."""
    printed = []
    # Somewhere else than the cluster, which is started where the tests are.
    command = _command(crawl, Path(out.name), engine)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=out.parent, env=WITH_ROOT
    ) as process:
        assert process.stdout
        for line in process.stdout:
            printed.append(line)
            if stage and line.startswith(f"{stage}: 1 of"):
                loss(process)
    assert process.returncode == code
    assert not stage or any(line.startswith(f"{stage}: 1 of") for line in printed)
    return "".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "stage"),
    [("nothing", ""), ("worker", "clean"), ("worker", "shards"), ("node", "clean")],
)
def test_ray_gives_the_same_bytes_whatever_is_lost(
    cluster: _Cluster,
    crawl: Path,
    native: dict[str, bytes],
    tmp_path: Path,
    lost: str,
    stage: str,
) -> None:
    losses = {"worker": cluster.kill_worker, "node": cluster.kill_node}
    loss = losses.get(lost)
    printed = _run_and(lambda _: loss and loss(), crawl, tmp_path / "data", cluster.engine, stage)
    assert f"clean: {FILES} of {FILES}" in printed
    assert len([name for name in native if name.endswith(".tar")]) > 3
    assert contents(tmp_path / "data") == native
    if lost == "node":
        cluster.add_node()


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_ends_its_tasks_and_continues(
    cluster: _Cluster, crawl: Path, native: dict[str, bytes], tmp_path: Path
) -> None:
    for stage in ("clean", "shards"):
        printed = _run_and(
            lambda process: process.send_signal(signal.SIGTERM),
            crawl,
            tmp_path / "data",
            cluster.engine,
            stage,
            STOPPED_ON_REQUEST,
        )
        assert f"{stage}: {FILES} of" not in printed
        assert not (tmp_path / "data" / "manifest.json").exists()
        _await_no_task()
    printed = _run_and(lambda _: None, crawl, tmp_path / "data", cluster.engine)
    assert "clean: 0 of" not in printed
    assert contents(tmp_path / "data") == native


def _await_no_task() -> None:
    """Wait until the cluster does nothing for the command any more."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        titles = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getpid() in _ancestors(int(entry.name)):
                    titles.append(_title(int(entry.name)))
        if not any(b"data_pipeline.ray_engine" in title for title in titles):
            return
        time.sleep(0.1)
    raise AssertionError("a task goes on although its command has ended")


FAILS = """
import os, sys
from functools import partial
from pathlib import Path
from data_pipeline.engine import open_engine

folder, engine = Path(sys.argv[1]), open_engine(sys.argv[2])
tasks = [(str(folder / name),) for name in ("a", "no/b", "c", "d")]
for _ in engine.do_each(os.mkdir, tasks, folder, partial(int, 0)):
    pass
"""


@pytest.mark.slow
def test_the_error_of_a_task_is_that_of_the_run(cluster: _Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILS, str(tmp_path), cluster.engine]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert (
        f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/no/b'" in done.stderr
    )


def test_a_cluster_that_does_not_answer_is_named(crawl: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        _command(crawl, tmp_path / "data", "ray=127.0.0.1:1"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2
    assert "error: engine=ray: no cluster answers at 127.0.0.1:1" in done.stderr
