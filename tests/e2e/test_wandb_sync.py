"""`farspan wandb sync` sends W&B whatever it lacks of a run."""

import json
import os
import signal
import sys

import pytest

from data_pipeline.shards import load_manifest
from data_pipeline.tokenize import train_tokenizer
from launch.local import rank_pids
from launch.slurm.start import Start
from launch.wandb_sync import steps_text
from pretrain.metrics.sinks import last_step
from pretrain.run_dir import RunDirectory
from tests.e2e.wandb_runs import (
    KEY,
    assert_mirrored,
    assert_no_key,
    attempt,
    evaluate,
    make_run,
    start_and_stop,
    sync,
    tables,
)
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.wandb_server import HISTORY


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
    for _ in range(2):
        live = sync(run, home)
        assert f"rows of metrics.jsonl up to step {logged} are at" in live.stdout, live.stderr
        assert ": sent" not in live.stdout
    assert_mirrored(server, run)
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    outputs = [*offline.communicate()]
    assert offline.returncode == 1
    assert not [*run.wandb.glob("run-*")]
    online = start_and_stop(
        [*command, "wandb.mode=online", "wandb.samples=0"],
        home,
        run,
        lambda: any(run.wandb.glob("run-*/run-*.wandb")),
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
