import json
import os
import subprocess
import sys
from math import nan
from pathlib import Path

import pytest

from pretrain.config import Config, load_config
from pretrain.metrics.wandb_sink import WandbSink
from pretrain.run_dir import RunDirectory
from tests.disks import files_of_at_most


def config_of(mode: str) -> Config:
    return load_config("tiny", [f"wandb.mode={mode}", "train.steps=7"])


def wandb_records(run: RunDirectory) -> list[list[dict]]:
    """The records of each W&B fragment in the run directory, as W&B's own tool prints them."""
    tool = Path(sys.executable).with_name("wandb")
    fragments = sorted(run.wandb.glob("offline-run-*/*.wandb"))
    outputs = [
        subprocess.run(
            [tool, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True
        ).stdout
        for file in fragments
    ]
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


def values_of(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    return run


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_numbers_and_histograms_are_mirrored_against_train_step(run, no_account, capfd):
    sink = WandbSink(run, config_of("offline"))
    sink.write(
        {
            "train/step": 7,
            "train/loss": 0.1 + 0.2,
            "moe/load": [[0.5, 0.25], [nan, 0.25]],
            "perf/sent_bytes_by_axis": {"tp": {"all_reduce": 96}},
            "train/loss_by_position": [5.0, 4.5, 4.0],
        }
    )
    sink.close()
    (records,) = wandb_records(run)
    (history,) = [history["item"] for history in values_of(records, "history")]
    assert history.pop("moe/load._type") == "histogram"
    assert [count for count in history.pop("moe/load.values") if count] == [2, 1]
    bins = history.pop("moe/load.bins")
    assert (bins[0], bins[-1]) == (0.25, 0.5)
    assert {k: v for k, v in history.items() if not k.startswith("_")} == {
        "train/step": 7,
        "train/loss": 0.1 + 0.2,
        "perf/sent_bytes_by_axis/tp/all_reduce": 96,
        "train/loss_by_position/1": 5.0,
        "train/loss_by_position/2": 4.5,
        "train/loss_by_position/4": 4.0,
    }
    assert {"glob_name": "*", "step_metric": "train/step"}.items() <= values_of(records, "metric")[
        1
    ].items()
    assert capfd.readouterr() == ("", "")


def test_a_restart_continues_the_same_run_and_its_numbers(run, no_account):
    for steps in ((1, 2, 3), (3, 4)):
        sink = WandbSink(run, config_of("offline"))
        for step in steps:
            sink.write({"train/step": step})
        sink.close()
    fragments = wandb_records(run)
    ids = {record["run_id"] for records in fragments for record in values_of(records, "run")}
    assert ids == {run.wandb_id.read_text()}
    rows = [row["item"] for records in fragments for row in values_of(records, "history")]
    assert [row["train/step"] for row in rows] == [1, 2, 3, 3, 4]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]


def test_a_full_disk_leaves_no_wandb_run_without_an_id(run, no_account, capsys):
    with files_of_at_most(0):
        WandbSink(run, config_of("offline")).close()
    assert f"{run.wandb_id} cannot be written: File too large" in capsys.readouterr().err
    assert not run.wandb_id.exists()


KILL_WANDB = """
import os, signal, sys, time
from pathlib import Path
from pretrain.config import load_config
from pretrain.metrics.wandb_sink import WandbSink
from pretrain.run_dir import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
sink = WandbSink(run, load_config("tiny"))
sink.write({"train/step": 1})
while not run.wandb_step.exists():
    time.sleep(0.01)
for children in Path("/proc/self/task").glob("*/children"):
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)
        os.waitpid(int(child), 0)
for step in range(2, 50):
    sink.write({"train/step": step})
sink.close()
print("trained")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's process in /proc")
def test_a_failure_is_reported_once_and_never_raised(run, no_account):
    done = subprocess.run(
        [sys.executable, "-c", KILL_WANDB, run.root], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "trained\n")
    # W&B may have said something itself.
    assert done.stderr.count("wandb: stopped mirroring, training goes on") == 1


def test_disabled_wandb_leaves_nothing(run):
    sink = WandbSink(run, config_of("disabled"))
    sink.write({"train/step": 1})
    sink.close()
    assert list(run.root.iterdir()) == []
