"""Runs that log to a W&B server of this process, and what that has of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.local import rank_pids
from launch.wandb_rows import mirrored_rows
from launch.wandb_sync import as_mirrored, digest, digest_of
from pretrain.config import load_config
from pretrain.metrics.sinks import last_step
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT
from tests.wandb_server import WandbServer

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


def evaluate(run: RunDirectory, step: int, right: int) -> None:
    """As `farspan eval --suite long` leaves what it has found."""
    run.evaluations.mkdir(exist_ok=True)
    cell = {"task": "needle", "length": 4096, "depth": 0.5, "questions": 4, "right": right}
    tree = {"step": step, "cells": [cell], "loss_by_position": []}
    run.evaluation("long", step).write_text(json.dumps(tree))


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
