"""W&B's own client and `farspan wandb` against a server on this machine."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import pytest

from pretrain.config import load_config, read_run_config
from pretrain.metrics.registry import METRICS, check_names
from pretrain.metrics.sinks import read_metrics
from pretrain.metrics.wandb_sink import described
from tests.e2e.wandb_runs import (
    KEY,
    assert_mirrored,
    assert_no_key,
    attempt,
    home_of,
    make_run,
    python,
    sync,
)
from tests.wandb_server import WandbServer


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
