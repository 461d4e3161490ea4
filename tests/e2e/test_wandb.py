"""W&B's own client and `farspan wandb` against a server on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest

from data_pipeline.shards import load_manifest
from data_pipeline.tokenize import train_tokenizer
from launch.local import rank_pids
from launch.slurm.start import Start
from launch.wandb_rows import mirrored_rows
from launch.wandb_sync import as_mirrored, digest, digest_of, steps_text
from pretrain.config import load_config, read_run_config
from pretrain.metrics.registry import METRICS, check_names
from pretrain.metrics.sinks import last_step, read_metrics
from pretrain.metrics.wandb_sink import described
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.wandb_server import HISTORY, WandbServer

KEY = "0123456789abcdef" * 2 + "f" * 8
# An attempt: rows go to metrics.jsonl and to W&B, as a run's rank 0 does it.
ATTEMPT = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from data_pipeline.tokenize import load_tokenizer
from pretrain.config import read_run_config
from pretrain.metrics.registry import METRICS, check_names
from pretrain.metrics.samples import Beginnings
from pretrain.metrics.sinks import JsonlSink, MetricsWriter
from pretrain.metrics.wandb_sink import WandbSink
from pretrain.run_dir import RunDirectory, write_atomically

run, first, stop, layout = RunDirectory(Path(sys.argv[1])), *map(int, sys.argv[2:4]), sys.argv[4]
attempt = run.begin_attempt()
write_atomically(run.ranks_of(attempt), json.dumps({"ranks": 1, "layout": layout}))
rows = JsonlSink(run.metrics)
rows.cut_back(first - 1, run.aside(attempt))
mirror = WandbSink(run, read_run_config(run))
writer = MetricsWriter([rows, mirror])
if run.tokenizer.exists():
    old, new = map(load_tokenizer(run.tokenizer).encode, ("It was long ago.", "New text"))
    pieces = np.array([[0, 7, 90, 90 + len(old)], [1, 3, 0, len(new)]])
    mirror.show(Beginnings([pieces], np.array([old + new])), ["books", "web"])
for step in range(first, stop):
    loss = float("nan") if step == 4 else 1 / step + attempt / 1000
    speed = {"perf/step_s": 0.5, "perf/tokens_per_s": 64.0}
    writer.log({"train/step": step, "train/loss": loss, "moe/load": [[0.5, 0.5]], **speed})
if "at once" not in sys.argv:
    while not run.wandb_step.exists():
        time.sleep(0.01)
if stop == 9:
    mirror.alert("rolled back", "step 8: a spike")
writer.close()
os._exit(0)
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer().serving() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def home(tmp_path: Path, server: WandbServer) -> dict[str, str]:
    return home_of(tmp_path, server.url)


def home_of(folder: Path, url: str) -> dict[str, str]:
    """The environment of somebody with a key for a server."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    own = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
    return inherited | own | {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}


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
        cwd=Path(environment["HOME"]).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def attempt(
    run: RunDirectory, environment: dict[str, str], first: int, stop: int, *more: str
) -> subprocess.CompletedProcess[str]:
    """
    Args:
        more: a layout; and "at once" to wait for no row of W&B.
    """
    done = python(environment, "-c", ATTEMPT, run.root, first, stop, *(more or ("one",)))
    assert done.returncode == 0, done.stderr
    return done


def sync(
    run: RunDirectory, environment: dict[str, str], wait: float = 0
) -> subprocess.CompletedProcess[str]:
    return python(environment, "-m", "launch.cli", "wandb", "sync", run.root, "--wait", wait)


def assert_mirrored(server: WandbServer, run: RunDirectory) -> None:
    """What the server has last of each step is the row of metrics.jsonl with what belongs to it,
    and W&B's logs of all this lie in the run directory.
    """
    assert not (run.root.parent / "wandb").exists()
    shown: dict[int, dict[str, object]] = {}
    for row in server.the_run().rows():
        shown.setdefault(row["train/step"], {}).update(row)
    for row in mirrored_rows(run, last_step(run.metrics)):
        of_step = shown[row.step].items()
        # A row that was undone may have had numbers that the one in its place has not.
        assert digest({k: v for k, v in of_step if k in as_mirrored(row)}) == digest_of(row)


def tables(server: WandbServer) -> list[list[list[object]]]:
    """The samples that the server was sent."""
    files = server.the_run().files
    return [json.loads(files[name])["data"] for name in files if name.startswith("media/table")]


def assert_no_key(run: RunDirectory) -> None:
    files = [file for file in run.root.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


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
    assert (
        f"all 8 rows of metrics.jsonl up to step 8 are at {server.url}/lab/farspan/runs/"
        in done.stdout
    )
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
def test_a_run_of_a_cluster_that_does_not_answer_is_synced(tmp_path, server, home):
    """From a machine that has its commands and not its network, or while it is restarted."""
    run = make_run(tmp_path / "run")
    attempt(run, home, 1, 5)
    Start("7", 0, "main", ("node1",), (1,), "2026-11-27T10:00:00").note(run, 1)
    slurm = FakeSlurm(tmp_path / "slurm")
    (slurm.path / "scontrol").write_text("#!/bin/bash\necho no such cluster >&2; exit 1\n")
    done = sync(run, home | {"PATH": f"{slurm.path}:{home['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert_mirrored(server, run)


@pytest.mark.slow
def test_a_fragment_torn_by_a_kill_is_completed_from_metrics_jsonl(tmp_path, server, home):
    run = make_run(tmp_path / "run")
    attempt(run, home, 1, 7)
    (torn,) = run.wandb.glob("offline-run-*/run-*.wandb")
    content = torn.read_bytes()
    # Within the fourth row.
    torn.write_bytes(content[: content.rindex(b"train/loss", 0, content.index(b"NaN"))])
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
    attempt(run, home, 1, 9, "one", "at once")
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
    # Nothing stands there twice but what was another number.
    assert server.the_run().rows()[-2] == {"train/step": 5, "train/loss": row["train/loss"]}


@pytest.mark.slow
def test_samples_and_evaluations_arrive_and_are_sent_again_where_they_are_lost(
    tmp_path, server, home
):
    """Of two attempts, the newer of which is sent first."""
    run = make_run(tmp_path / "run")
    train_tokenizer(["It was long ago. New text"], 300, run.tokenizer)
    attempt(run, home, 1, 4, "dp 2")
    (older,) = run.wandb.glob("offline-run-*/run-*.wandb")
    run.tokenizer.unlink()
    attempt(run, home, 4, 9, "tp 2")
    older.with_name(f"{older.name}.synced").touch()
    evaluate(run, step=8, right=3)
    done = sync(run, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B lacks 4 of 8 rows: steps 1-3, 8" in done.stdout
    older.with_name(f"{older.name}.synced").unlink()
    assert sync(run, home).returncode == 0
    stored = server.the_run()
    assert stored.values("farspan")["attempt"] == 2
    text = [
        [0, "books", 7, 0, 90, 5, "It was long ago."],
        [0, "web", 3, 5, 0, 3, "New text"],
    ]
    # Sent by the sync from samples.json, and then in the fragment.
    assert tables(server) == [text, text]
    assert [row for row in stored.rows() if row["train/step"] == 8][-1]["eval/needle/4096"] == 0.75
    evaluate(run, step=8, right=4)
    evaluate(run, step=9, right=1)
    done = sync(run, home)
    assert "W&B lacks 2 of 9 rows: steps 8-9" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
    assert stored.rows()[-2:] == [
        {"train/step": 8, "eval/needle/4096": 1.0},
        {"train/step": 9, "eval/needle/4096": 0.25},
    ]
    assert [row["train/step"] for row in stored.rows() if "train/loss" in row].count(8) == 1
    sent = len(stored.lines[HISTORY])
    assert sync(run, home).returncode == 0
    assert len(stored.lines[HISTORY]) == sent


def evaluate(run: RunDirectory, step: int, right: int) -> None:
    """As `farspan eval --suite long` leaves what it has found."""
    run.evaluations.mkdir(exist_ok=True)
    cell = {"task": "needle", "length": 4096, "depth": 0.5, "questions": 4, "right": right}
    tree = {"step": step, "cells": [cell], "loss_by_position": []}
    run.evaluation("long", step).write_text(json.dumps(tree))


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


def test_a_run_goes_on_online_with_its_key_nowhere(tmp_path, server, home):
    run = make_run(tmp_path / "run", "wandb.mode=online", "wandb.entity=lab")
    outputs = [
        attempt(run, home, 1, 7, "dp 2"),
        attempt(run, home, 5, 9, "tp 2"),
        sync(run, home),
    ]
    assert outputs[-1].returncode == 0, outputs[-1].stdout + outputs[-1].stderr
    assert [row["train/step"] for row in server.the_run().rows()] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert "W&B also has" not in outputs[-1].stdout
    assert_mirrored(server, run)
    assert server.the_run().values("farspan")["layout"] == "tp 2"
    assert server.the_run().alerts == [("rolled back", "step 8: a spike")]
    assert outputs[0].stdout + outputs[0].stderr == ""
    assert list(run.root.rglob("debug-internal.log"))
    texts = [output.stdout + output.stderr for output in outputs]
    assert not any(KEY in text for text in texts)
    assert_no_key(run)


@pytest.mark.slow
def test_no_server_delays_or_ends_training(tmp_path):
    """Each run has a server that fails in its own way until the run is over."""
    over = Event()

    def answer_late(path: str, body: bytes) -> int:
        over.wait()
        return 500

    refusals = {
        "answers 500": lambda path, body: 500,
        "drops connections": lambda path, body: 0,
        "drops the rows": lambda path, body: 0 if "file_stream" in path else None,
        "takes our key for none": lambda path, body: 401,
        "is not there": lambda path, body: 0,
        "never answers": answer_late,
    }
    with ExitStack() as stack, ThreadPoolExecutor(len(refusals)) as pool:
        servers, runs, attempts = {}, {}, {}
        for kind, refuse in refusals.items():
            servers[kind] = stack.enter_context(WandbServer().serving())
            servers[kind].refuse = refuse
            runs[kind] = make_run(tmp_path / kind, "wandb.mode=online")
            url = "http://127.0.0.1:9" if kind == "is not there" else servers[kind].url
            environment = home_of(tmp_path / kind, url)
            attempts[kind] = pool.submit(attempt, runs[kind], environment, 1, 7, "one", "at once")
        errors = {kind: done.result().stderr for kind, done in attempts.items()}
        over.set()
        for kind, server in servers.items():
            # Where it goes on offline, a busy machine may not come to the end of that either.
            # That it is not online, and that it was too slow, may both be true.
            told = errors[kind].count("`farspan wandb sync RUN` sends the rest")
            assert 1 <= told <= 2, errors[kind]
            assert [row["train/step"] for row in read_metrics(runs[kind].metrics)] == [*range(1, 7)]
            server.refuse = lambda path, body: None
            done = sync(runs[kind], home_of(tmp_path / kind, server.url))
            assert done.returncode == 0, done.stdout + done.stderr
            assert_mirrored(server, runs[kind])


@pytest.mark.slow
def test_sync_says_what_is_wrong(tmp_path, server, home):
    run = make_run(tmp_path / "run")
    done = sync(run, home)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {run.root} has no metrics.jsonl yet: nothing was logged\n",
    )
    run.metrics.write_text('{"train/step": 1, "perf/step_s": 1, "perf/tokens_per_s": 1}\n')
    done = sync(run, {k: v for k, v in home.items() if k != "WANDB_API_KEY"})
    assert done.returncode == 2
    assert "set WANDB_API_KEY, or run `wandb login`" in done.stderr
    done = sync(run, home | {"WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert done.returncode == 1
    assert "error: the W&B server http://127.0.0.1:9 does not answer" in done.stderr
    server.refuse = lambda path, body: 500
    done = sync(run, home)
    assert done.returncode == 1
    assert f"error: the W&B server {server.url} does not answer" in done.stderr
    server.refuse = lambda path, body: 401
    done = sync(run, home)
    assert done.returncode == 1
    assert f"error: the W&B server {server.url} does not let us in" in done.stderr


@pytest.mark.slow
def test_training_is_synced_while_it_runs_and_after_a_kill(shards, tmp_path, server, home):
    """Rank 0 stands still offline while the first rows are synced, and is killed. The next attempt
    is online, where a sync is refused, and shows none of its data.
    """
    run = RunDirectory(tmp_path / "run")
    command = [
        *(sys.executable, "-m", "launch.cli", "train", "tiny", "--run-dir", run.root),
        *("--max-restarts", "0", f"data.shards={shards}", "train.steps=12", "checkpoint.every=4"),
        # W&B may take longer to start than short steps do.
        "data.seq_len=1024",
    ]
    offline = start_and_stop(
        command,
        home,
        run,
        lambda: run.metrics.exists() and last_step(run.metrics) >= 6 and run.wandb_step.exists(),
    )
    logged = last_step(run.metrics)
    live = sync(run, home)
    assert f"rows of metrics.jsonl up to step {logged} are at" in live.stdout, live.stderr
    assert ": sent" not in live.stdout
    assert_mirrored(server, run)
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    outputs = [*offline.communicate()]
    assert offline.returncode == 1
    # The sync has left some, too.
    before = {*run.wandb.glob("run-*/run-*.wandb")}
    online = start_and_stop(
        [*command, "wandb.mode=online", "wandb.samples=0"],
        home,
        run,
        lambda: {*run.wandb.glob("run-*/run-*.wandb")} != before,
    )
    refused = sync(run, home)
    assert refused.returncode == 2
    assert "is being trained with wandb.mode=online, and sends its rows itself" in refused.stderr
    os.kill(rank_pids(run)[0], signal.SIGCONT)
    outputs += online.communicate()
    assert online.returncode == 0, outputs
    done = sync(run, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 12 rows of metrics.jsonl up to step 12 are at" in done.stdout
    assert_mirrored(server, run)
    about = server.the_run().values("farspan")
    assert about["ranks"] == 1
    assert about["data"][0]["shards"] == load_manifest(shards).sha256
    # That of the first attempt, which may have come by two ways.
    (table,) = {json.dumps(table) for table in tables(server)}
    assert {row[0] for row in json.loads(table)} == {0, 1, 2, 3}
    assert [run.samples_of(number).exists() for number in (1, 2)] == [True, False]
    assert not any(KEY in output for output in outputs)
    assert_no_key(run)


def start_and_stop(
    command: list[object],
    environment: dict[str, str],
    run: RunDirectory,
    is_far_enough: Callable[[], bool],
) -> subprocess.Popen[str]:
    """Start training, and let its rank 0 stand still at some point."""
    attempts = len(run.all_attempts())
    training = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(run.all_attempts()) == attempts or not is_far_enough():
        assert training.poll() is None, training.communicate()
        time.sleep(0.02)
    (rank,) = rank_pids(run)
    os.kill(rank, signal.SIGSTOP)
    return training


def test_panels_are_of_registered_metrics_and_export_without_a_network(tmp_path):
    environment = home_of(tmp_path, "http://127.0.0.1:9")
    del environment["WANDB_API_KEY"]
    command = ("-m", "launch.cli", "wandb", "dashboard", "export", "--project", "long")
    printed, filed = python(environment, *command), python(environment, *command, "--out", "b.json")
    assert (printed.returncode, filed.returncode) == (0, 0), printed.stderr + filed.stderr
    assert printed.stdout == (tmp_path / "b.json").read_text()
    bank = json.loads(printed.stdout)["spec"]["section"]["panelBankConfig"]
    panels = [panel["config"] for section in bank["sections"] for panel in section["panels"]]
    assert {panel["xAxis"] for panel in panels} == {"train/step"}
    assert [section["name"] for section in bank["sections"]] == [
        *("Training health", "MoE", "Long context", "Performance", "Data", "Reliability"),
        "Evaluation",
    ]
    for panel in panels:
        names = panel.get("metrics") or [panel["metricRegex"].removesuffix("/.*")]
        check_names(names)
        assert {METRICS[name].unit for name in names} == {panel["yAxisTitle"]}


@pytest.mark.slow
def test_a_second_push_replaces_the_dashboard(tmp_path, server, home):
    push = ("-m", "launch.cli", "wandb", "dashboard", "push", "--project", "long")
    refused = python(home, *push)
    assert refused.returncode == 2
    assert "lab has no project 'long' at W&B: train with wandb.mode=online" in refused.stderr
    server.projects.append("long")
    for _ in range(2):
        done = python(home, *push)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{server.url}/lab/long?nw=farspan\n"
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"]) == ("lab", "long")
    exported = python(home, *push[:-3], "export", "--entity", "lab", "--project", "long").stdout
    assert json.loads(view["spec"]) == json.loads(exported)["spec"]


def test_credentials_in_addresses_stay_here(tmp_path):
    secret = "https://me:word@host:81/a/b?X-Amz-Signature=5ec2e7"
    run = make_run(tmp_path / "run", f"data.shards={secret}", "checkpoint.dir=s3://key:word@bucket")
    sent = described(run, read_run_config(run))
    assert sent["data"]["shards"] == "https://host:81/a/b"
    assert sent["checkpoint"]["dir"] == "s3://bucket"
    assert sent["data"]["seq_len"] == load_config("tiny").data.seq_len
