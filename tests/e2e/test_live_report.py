"""The page of runs that go on, in a browser."""

import json
import math
import threading
from contextlib import contextmanager

import pytest

from launch import live_report
from launch.live_report import LiveReport
from launch.report import named_runs
from launch.report_server import open_server
from pretrain.config import load_config
from pretrain.metrics.history import read_history
from pretrain.metrics.report import Run, chart_columns
from pretrain.metrics.sinks import JsonlSink
from pretrain.run_dir import RunDirectory
from tests.browser import IS_DISPENSABLE, browser

pytestmark = pytest.mark.skipif(IS_DISPENSABLE, reason="no chromium on this machine")

STEPS = "Bokeh.documents[0].get_model_by_name('steps')"
IS_DRAWN = f"!!(window.Bokeh?.documents.length && {STEPS})"
LIVE = "document.getElementById('live')"


def make_run(root):
    run = RunDirectory(root)
    run.root.mkdir()
    run.config.write_text(load_config("tiny-hybrid-moe", ["train.steps=1000"]).to_yaml())
    return run


def log(run, steps, **more):
    sink = JsonlSink(run.metrics)
    for step in steps:
        load = [[(1 + math.sin(step + expert)) / 8 for expert in range(4)]]
        row = {"train/step": step, "train/loss": 5 / step, "moe/load": load, "train/lr": 1e-3}
        row["train/grad_norm_by_layer"] = [1.0, 2.0 + step, 3.0]
        sink.write(row | more)
    sink.close()


@contextmanager
def served(runs, port=0):
    report = LiveReport(named_runs([run.root for run in runs]))
    stop = threading.Event()
    with open_server(report, "127.0.0.1", port) as server:
        threads = [
            threading.Thread(target=server.serve_forever),
            threading.Thread(target=report.follow, args=(stop,)),
        ]
        for thread in threads:
            thread.start()
        try:
            yield server.server_port
        finally:
            stop.set()
            server.shutdown()
            for thread in threads:
                thread.join()


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(live_report, "LOOK_S", 0.05)
    monkeypatch.setattr(live_report, "POLL_S", 0.1)
    with browser(tmp_path / "profile") as page:
        yield page


def source_of(metric, run):
    return f"Bokeh.documents[0]?.get_model_by_name({json.dumps(f'{metric}|{run}')})"


def drawn_steps(page, metric, run):
    return page.js(f"[...({source_of(metric, run)}?.data.step ?? [])]")


def wait_for_step(page, run, step):
    last = f"{source_of('train/loss', run)}?.data.step.at(-1)"
    page.wait_for(f"{IS_DRAWN} && {last} == {step}")


def zoom(page):
    return page.js(f"[{STEPS}.start, {STEPS}.end]")


def test_page_follows_a_run_and_keeps_its_zoom(tmp_path, page):
    run = make_run(tmp_path / "my-run")
    with served([run]) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for(f"{LIVE}.textContent == 'live'")
        assert "No metrics were logged yet." in page.js("document.body.innerText")

        log(run, range(1, 21))
        wait_for_step(page, "my-run", 20)
        whole = zoom(page)
        assert page.js("document.getElementById('span').textContent") == "5 steps"
        page.js("window.has_stayed = true")
        log(run, range(21, 41))
        wait_for_step(page, "my-run", 40)
        assert page.js("document.getElementById('smoothing').max") == "4"
        assert drawn_steps(page, "train/loss", "my-run") == list(range(1, 41))
        assert zoom(page)[1] > whole[1]
        page.wait_for("document.getElementById('headline').innerText.includes('0.1250')")
        expected = chart_columns([Run("my-run", run, read_history(run.metrics))])
        image = f"{source_of('moe/load:1', 'my-run')}.data.image[0]"
        assert page.js(f"{image}.shape") == [4, 40]
        assert (
            page.js(f"[...{image}]") == expected["moe/load:1|my-run"]["image"][0].ravel().tolist()
        )

        page.js(f"{{ {STEPS}.setv({{ start: 5, end: 10 }}) }}")
        log(run, [41])
        wait_for_step(page, "my-run", 41)
        assert zoom(page) == [5, 10]
        assert page.js("window.has_stayed")

        # A chart that is new comes with a new page, which looks at the same steps.
        log(run, [42], **{"train/grad_norm": 1.5})
        page.wait_for(f"{IS_DRAWN} && !!{source_of('train/grad_norm', 'my-run')}")
        page.wait_for(f"{STEPS}.start == 5 && {STEPS}.end == 10")
        assert not page.js("window.has_stayed ?? false")
    assert page.messages == []


def test_page_goes_on_where_a_run_was_rolled_back_and_a_server_came_back(tmp_path, page):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    for run in runs:
        log(run, range(1, 31))
    with served(runs) as port:
        page.open(f"http://127.0.0.1:{port}/")
        wait_for_step(page, "two", 30)
        page.wait_for(f"{LIVE}.textContent == 'live'")
        page.js("window.has_stayed = true")
    page.wait_for(f"{LIVE}.classList.contains('away')")
    assert "No answer since" in page.js(f"{LIVE}.textContent")

    sink = JsonlSink(runs[1].metrics)
    aside = tmp_path / "aside"
    aside.mkdir()
    sink.cut_back(10, aside)
    sink.close()
    log(runs[1], range(11, 14))
    log(runs[0], [31])
    with served(runs, port):
        page.wait_for(f"{LIVE}.textContent == 'live'")
        assert drawn_steps(page, "train/loss", "two") == list(range(1, 14))
        assert drawn_steps(page, "train/loss", "one") == list(range(1, 32))
        assert page.js("window.has_stayed")
    assert page.messages == []
