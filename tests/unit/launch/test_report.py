import base64
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import zip_longest

import numpy as np
import pytest

from launch import live_report
from launch.live_report import LiveReport
from launch.report import named_runs, report_runs
from launch.report_server import open_server
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.metrics import history
from pretrain.metrics.sinks import JsonlSink
from pretrain.run_dir import RunDirectory
from tests.ranks import TIMEOUT_S


def make_run(root):
    run = RunDirectory(root)
    root.mkdir(parents=True)
    run.config.write_text(load_config("tiny-hybrid-moe", []).to_yaml())
    return run


def log(run, steps, **more):
    sink = JsonlSink(run.metrics)
    for step in steps:
        load = [[0.25, 0.75], [0.5, 0.5]]
        sink.write({"train/step": step, "train/loss": 1 / step, "moe/load": load, **more})
    sink.close()


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "first")


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch):
    monkeypatch.setattr(live_report, "LOOK_S", 0.0)


class Page:
    """What a browser has, kept up to date as live.js does."""

    def __init__(self):
        self.version = ""
        self.sources = {}
        self.fragments = {}
        self.sent = {}

    def take(self, changes):
        self.version = changes["version"]
        self.sent = changes
        self.fragments |= changes["fragments"]
        for name, columns in changes["sources"].items():
            source = self.sources.setdefault(name, {})
            for column, news in columns.items():
                source[column] = self._column(source.get(column, ()), news)

    def _column(self, old, news):
        if "values" in news:
            return news["values"]
        if "images" in news:
            return [
                self._image(before, image) for before, image in zip_longest(old, news["images"])
            ]
        fresh = self._decoded(news)
        return np.concatenate([np.asarray(old[: news["kept"]], fresh.dtype), fresh])

    def _image(self, old, news):
        rows, columns = news["shape"]
        fresh = self._decoded(news).reshape(rows, columns - news["kept"])
        return np.concatenate([old[:, : news["kept"]], fresh], axis=1) if news["kept"] else fresh

    def _decoded(self, sent):
        return np.frombuffer(base64.b64decode(sent["data"]), sent["dtype"])

    def assert_shows(self, other):
        assert self.fragments == other.fragments
        assert self.sources.keys() == other.sources.keys()
        for name, columns in other.sources.items():
            for column, values in columns.items():
                np.testing.assert_array_equal(self.sources[name][column], values)


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/run", "b/run", "c/other", "c/b/run")]
    for folder in folders:
        folder.mkdir(parents=True)
    runs = named_runs([*folders, tmp_path / "a" / ".." / "a" / "run"])
    parent = tmp_path.name
    assert [run.name for run in runs] == ["a/run", f"{parent}/b/run", "other", "c/b/run"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"port": 1}, "--port belongs to --serve"),
        ({"host": "0.0.0.0"}, "--host belongs to --serve"),
        ({"serve": True, "out": "page.html"}, "choose one of them"),
        ({"out": "nowhere/page.html"}, "there is no folder"),
        ({"paths": 2}, "--out runs.html"),
        ({"out": "."}, "is a folder; name a file"),
        ({"paths": 0}, "is not a run directory"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, run, options, told):
    settings = {"out": None, "serve": False, "port": None, "host": None, **options}
    paths = [run.root, make_run(tmp_path / "second").root][: settings.pop("paths", 1)]
    settings["out"] = settings["out"] and tmp_path / settings["out"]
    with pytest.raises(UserError, match=told):
        report_runs(paths or [tmp_path / "none"], **settings)


def test_what_is_no_run_cannot_be_written_about(tmp_path, run):
    with pytest.raises(UserError, match="is not a run directory"):
        report_runs([tmp_path], None, serve=False, port=None, host=None)
    with pytest.raises(UserError, match=f"is a file; name the run directory, as in {run.root}$"):
        report_runs([run.config], None, serve=True, port=0, host=None)


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path):
    report = LiveReport(named_runs([tmp_path / "later"]))
    assert not report.look()
    assert report.changes("")["sources"] == {}
    assert "later" in report.page()
    log(make_run(tmp_path / "later"), [1])
    assert report.look()
    assert report.changes("")["sources"]


def test_several_runs_of_different_metrics_share_a_page(tmp_path, run):
    log(run, range(1, 5))
    other = make_run(tmp_path / "runs" / "second")
    log(other, range(1, 9), **{"train/of_another_version": 0.5, "text": "x", "deep": {"a": [1]}})
    other.config.write_text("model: {of_another_version: 1}\n")
    report_runs([run.root, other.root], tmp_path / "both.html", serve=False, port=None, host=None)
    page = (tmp_path / "both.html").read_text()
    assert "first" in page
    assert "second" in page
    assert "train/of_another_version" in page


def test_a_page_gets_only_what_is_new_and_shows_the_same(tmp_path, run):
    report = LiveReport(named_runs([run.root]))
    assert report.changes("")["state"] == "reading, 0%"
    report.look()
    page = Page()
    page.take(report.changes(page.version))
    assert page.sources == {}

    log(run, range(1, 4))
    report.look()
    layout = page.sent["layout"]
    page.take(report.changes(page.version))
    assert page.sent["layout"] != layout
    loss = next(name for name in page.sources if name.startswith("train/loss|"))
    assert page.sources[loss]["step"].tolist() == [1, 2, 3]
    late = Page()
    late.take(report.changes(""))
    late.assert_shows(page)

    report.look()
    page.take(report.changes(page.version))
    assert page.sent["sources"] == {}
    layout = page.sent["layout"]

    log(run, [4])
    report.look()
    page.take(report.changes(page.version))
    assert page.sent["sources"][loss]["step"]["kept"] == 3
    assert page.sent["layout"] == layout
    assert page.sources[loss]["value"][-1] == 0.25
    load = next(name for name in page.sources if name.startswith("moe/load:"))
    (image,) = page.sent["sources"][load]["image"]["images"]
    assert (image["kept"], image["shape"]) == (3, (2, 4))

    # Back to step 2, and on from there.
    sink = JsonlSink(run.metrics)
    aside = tmp_path / "aside"
    aside.mkdir()
    sink.cut_back(2, aside)
    sink.close()
    log(run, [3], **{"train/grad_norm": float("nan")})
    report.look()
    for browser in (page, late):
        browser.take(report.changes(browser.version))
    assert page.sources[loss]["step"].tolist() == [1, 2, 3]
    fresh = Page()
    fresh.take(report.changes("of another server"))
    late.assert_shows(fresh)
    page.assert_shows(fresh)


def test_a_page_is_left_as_it_is_until_a_long_file_has_been_read(run, monkeypatch):
    monkeypatch.setattr(history, "BLOCK_BYTES", 1000)
    log(run, range(1, 40))
    report = LiveReport(named_runs([run.root]))
    report.look()
    changes = report.changes("")
    assert changes["state"].startswith("reading, ")
    assert "sources" not in changes
    while report.look():
        pass
    changes = report.changes("")
    assert (changes["state"], "sources" in changes) == ("live", True)
    assert "train/loss|first" in changes["sources"]


def test_a_file_that_cannot_be_read_is_told_on_the_page(run):
    run.metrics.mkdir()
    report = LiveReport(named_runs([run.root]))
    report.look()
    assert "cannot be read" in report.changes("")["state"]
    run.metrics.rmdir()
    report.look()
    assert report.changes("")["state"] == "live"


def test_more_rows_of_a_heat_map_need_a_new_page(run):
    report = LiveReport(named_runs([run.root]))
    layouts = []
    for step, layers in enumerate((2, 2, 3), 1):
        log(run, [step], **{"train/grad_norm_by_layer": [1.0 + step] * layers})
        report.look()
        layouts.append(report.changes("")["layout"])
    assert layouts[0] == layouts[1] != layouts[2]


def test_what_cannot_be_parsed_is_told_and_what_is_left_is_read(run, monkeypatch):
    log(run, [1])
    report = LiveReport(named_runs([run.root]))
    with monkeypatch.context() as patch:
        patch.setattr(history, "parse_rows", lambda lines, first_line: 1 / 0)
        report.look()
        assert "ZeroDivisionError" in report.changes("")["state"]
    report.look()
    assert "train/loss|first" in report.changes("")["sources"]


def test_an_ended_run_is_asked_for_less_often(run):
    log(run, [1])
    report = LiveReport(named_runs([run.root]))
    report.look()
    live = report.changes("")
    run.mark_done(1, run.begin_attempt())
    ended = report.changes("")
    assert (live["state"], ended["state"]) == ("live", "ended")
    assert live["poll_s"] < ended["poll_s"]


@contextmanager
def served(run, host="127.0.0.1"):
    report = LiveReport(named_runs([run.root]))
    report.look()
    with open_server(report, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def get(port, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_server_has_one_page_and_answers_only_by_its_own_names(run):
    log(run, [1])
    with served(run) as port:
        status, page = get(port, "/")
        assert (status, "train/loss" in page, "changes?since=" in page) == (200, True, True)
        status, changes = get(port, "/changes?since=x")
        assert (status, "sources" in json.loads(changes)) == (200, True)
        paths = ("/config.yaml", "/../config.yaml", "/%2e%2e/", "/metrics.jsonl", "/page")
        for path in paths:
            status, text = get(port, path)
            assert (status, text) == (404, "there is one page, /")
        assert get(port, "/", "POST")[0] == 501
        for host, expected in {
            "evil.example": 403,
            f"evil.example:{port}": 403,
            "": 403,
            "127.0.0.1.evil.example": 403,
            "[": 403,
            f"localhost:{port + 1}": 200,
            "[::1]:80": 200,
            "10.0.0.7": 200,
            socket.gethostname(): 200,
        }.items():
            assert get(port, "/changes", Host=host)[0] == expected, host


def test_a_page_that_cannot_be_made_is_told_and_the_server_lives_on(run, monkeypatch, capsys):
    log(run, [1])
    with served(run) as port:
        with monkeypatch.context() as patch:
            patch.setattr(live_report, "fragments", lambda runs: 1 / 0)
            status, text = get(port, "/changes")
            assert (status, "ZeroDivisionError" in text) == (500, True)
        assert get(port, "/changes")[0] == 200
    assert "Traceback" in capsys.readouterr().err


def test_the_server_answers_to_the_name_it_was_given(run):
    log(run, [1])
    # No address as a browser writes it, so it stands for a name.
    with served(run, host="127.1") as port:
        assert get(port, "/changes", Host=f"127.1:{port}")[0] == 200
        assert get(port, "/changes", Host="127.2")[0] == 403


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", "is in use.*--port 0"),
        ("192.0.2.1", "has no such address"),
        ("no such host", "no such address"),
    ],
)
def test_an_address_that_cannot_be_used_is_told(run, host, told):
    report = LiveReport(named_runs([run.root]))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=told):
        open_server(report, host, taken.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_tells_its_address_and_ends_in_order(run, number):
    log(run, [1])
    command = [sys.executable, "-m", "launch.cli", "report", str(run.root), "--serve", "--port=0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as server:
        try:
            told = "".join(server.stdout.readline() for _ in range(3))
            port = int(re.search(r"following first: http://127.0.0.1:(\d+) ", told).group(1))
            assert f"ssh -N -L {port}:127.0.0.1:{port} " in told
            assert get(port, "/elsewhere")[0] == 404
            server.send_signal(number)
            assert server.communicate(timeout=TIMEOUT_S) == ("", "")
        finally:
            server.kill()
    assert server.returncode == 0
