"""W&B's own client and `farspan wandb` against a server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.wandb_sync import digest, steps_text
from pretrain.config import load_config
from pretrain.metrics.sinks import read_metrics
from pretrain.metrics.wandb_sink import scalars
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT
from tests.wandb_server import HISTORY, WandbServer

KEY = "0123456789abcdef" * 2 + "f" * 8
# An attempt: rows go to metrics.jsonl and to W&B, as a run's rank 0 does it.
ATTEMPT = """
import json, os, sys, time
from pathlib import Path
from pretrain.config import read_run_config
from pretrain.metrics.sinks import JsonlSink, MetricsWriter
from pretrain.metrics.wandb_sink import WandbSink
from pretrain.run_dir import RunDirectory, write_atomically

run, first, stop, layout = RunDirectory(Path(sys.argv[1])), *map(int, sys.argv[2:4]), sys.argv[4]
attempt = run.begin_attempt()
write_atomically(run.ranks_of(attempt), json.dumps({"ranks": 1, "layout": layout}))
rows = JsonlSink(run.metrics)
rows.cut_back(first - 1, run.aside(attempt))
began = time.monotonic()
mirror = WandbSink(run, read_run_config(run))
writer = MetricsWriter([rows, mirror])
for step in range(first, stop):
    loss = float("nan") if step == 4 else 1 / step + attempt / 1000
    speed = {"perf/step_s": 0.5, "perf/tokens_per_s": 64.0}
    writer.log({"train/step": step, "train/loss": loss, "moe/load": [[0.5, 0.5]], **speed})
print("logged in", time.monotonic() - began, flush=True)
if stop == 9:
    mirror.alert("rolled back", "step 8: a spike")
writer.close()
print("closed in", time.monotonic() - began, flush=True)
os._exit(0)
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer().serving() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def home(tmp_path: Path, server: WandbServer) -> dict[str, str]:
    """The environment of somebody with a key for the server."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
    return inherited | own | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


def make_run(root: Path, *settings: str) -> RunDirectory:
    run = RunDirectory(root)
    run.root.mkdir()
    config = load_config("tiny", ["train.steps=8", *settings])
    run.config.write_text(config.to_yaml())
    run.versions.write_text(json.dumps({"git": "abc1234", "torch": "2.13"}))
    run.data.write_text(json.dumps([{"shards": "5ha", "tokenizer": "70c", "weight": 1.0}]))
    return run


def python(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def attempt(
    run: RunDirectory, environment: dict[str, str], first: int, stop: int, layout: str = "one"
) -> subprocess.CompletedProcess[str]:
    done = python(environment, "-c", ATTEMPT, run.root, first, stop, layout)
    assert done.returncode == 0, done.stderr
    return done


def sync(
    run: RunDirectory, environment: dict[str, str], wait: float = 0
) -> subprocess.CompletedProcess[str]:
    return python(environment, "-m", "launch.cli", "wandb", "sync", run.root, "--wait", wait)


def assert_mirrored(server: WandbServer, run: RunDirectory) -> None:
    """The last row of each step that the server has is that of metrics.jsonl."""
    by_step = {row["train/step"]: digest(row) for row in server.the_run().rows()}
    expected = {row["train/step"]: digest(scalars(row)) for row in read_metrics(run.metrics)}
    assert {step: by_step.get(step) for step in expected} == expected


def test_steps_are_told_as_spans():
    assert steps_text((3,)) == "steps 3"
    assert steps_text((1, 2, 3, 7, 9, 10)) == "steps 1-3, 7, 9-10"
    assert steps_text(tuple(range(1, 40, 2))).endswith("13, 15 and 12 more spans")


def test_offline_attempts_become_one_run_with_every_row(tmp_path, server, home):
    """The second attempt goes on from step 5, in another layout; the first had come to step 6."""
    run = make_run(tmp_path / "run")
    without_key = {k: v for k, v in home.items() if k != "WANDB_API_KEY"}
    attempt(run, without_key, 1, 7, "dp 2")
    attempt(run, without_key, 5, 9, "tp 2")
    assert server.operations == []
    done = sync(run, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": sent\n") == 2
    assert f"all 8 rows of metrics.jsonl are at {server.url}/lab/farspan/runs/" in done.stdout
    assert "W&B lacks" not in done.stdout
    assert_mirrored(server, run)
    stored = server.the_run()
    assert [row["train/step"] for row in stored.rows()] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    about = stored.values("farspan")
    assert about["layout"] == "tp 2"
    assert about["git"] == "abc1234"
    assert about["data"] == [{"shards": "5ha", "tokenizer": "70c", "weight": 1.0}]
    assert stored.values("train")["steps"] == 8
    assert stored.alerts == [("rolled back", "step 8: a spike")]
    asked = len(stored.lines[HISTORY])
    assert sync(run, home).returncode == 0
    assert len(stored.lines[HISTORY]) == asked


@pytest.mark.slow
def test_a_fragment_torn_by_a_kill_is_completed_from_metrics_jsonl(tmp_path, server, home):
    run = make_run(tmp_path / "run")
    attempt(run, home, 1, 7)
    (torn,) = run.wandb.glob("offline-run-*/run-*.wandb")
    content = torn.read_bytes()
    # Within the fourth row.
    torn.write_bytes(content[: content.index(b"train/loss", content.index(b"NaN") - 200)])
    attempt(run, home, 7, 9)
    done = sync(run, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B lacks 3 of 8 rows: steps 4-6" in done.stdout
    assert_mirrored(server, run)
    rows = [row["train/step"] for row in server.the_run().rows()]
    assert rows == [1, 2, 3, 7, 8, 4, 5, 6]


@pytest.mark.slow
def test_rows_that_the_server_loses_or_changes_are_sent_again(tmp_path, server, home):
    run = make_run(tmp_path / "run", "wandb.mode=disabled")
    attempt(run, home, 1, 9)
    assert not run.wandb.exists()
    done = sync(run, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B lacks 8 of 8 rows: steps 1-8" in done.stdout
    lines = server.the_run().lines[HISTORY]
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"train/loss": row["train/loss"] + 1e-12})
    del lines[7]
    done = sync(run, home)
    assert "W&B lacks 2 of 8 rows: steps 5, 8" in done.stdout
    assert_mirrored(server, run)


@pytest.mark.slow
def test_rows_that_do_not_arrive_fail_the_sync(tmp_path, server, home):
    run = make_run(tmp_path / "run")
    attempt(run, home, 1, 4)
    take, server.take_stream = server.take_stream, lambda name, content: None
    done = sync(run, home)
    assert done.returncode == 1
    assert "still missing, say it again later: steps 1-3" in done.stdout
    server.take_stream = take
    assert sync(run, home).returncode == 0
    assert_mirrored(server, run)
