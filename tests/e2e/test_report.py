import base64
import gzip
import json
import math
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.config import load_config
from pretrain.metrics.history import read_history
from pretrain.metrics.report import Run, render_page
from pretrain.metrics.sinks import JsonlSink
from pretrain.run_dir import RunDirectory
from tests.browser import IS_DISPENSABLE, Browser, browser

LAYERS, EXPERTS, STEPS = 4, 8, 500
DEAD_LAYER, DEAD_EXPERT = 2, 5
BLUE = (0x3D, 0x7E, 0xDB)
MANIFEST = {
    "unigram_entropy": 7.213,
    "funnel": [
        {"stage": "extract", "reason": "not HTML", "documents": 61},
        {"stage": "quality", "reason": "too few words <3", "documents": 1939},
        {"stage": "shards", "reason": "kept", "documents": 6000},
    ],
}


def metrics_rows(layers: int, experts: int, steps: int) -> list[dict]:
    random = np.random.default_rng(0)
    loads = random.dirichlet(np.full(experts, 50.0), size=(steps, layers))
    rows = []
    for step, load in enumerate(loads, start=1):
        rows.append(
            {
                "train/step": step,
                "train/loss": 2.5 + 5 * math.exp(-step / 60) + random.normal(0, 0.05),
                "train/aux_loss": 1.0 + 1 / step,
                "train/tokens": step * 2048,
                "train/grad_norm": 0.5 + 2 * math.exp(-step / 40),
                "train/lr": 1e-3 * min(1, step / 20),
                "perf/tokens_per_s": 18_500.0,
                "moe/load": load.tolist(),
                "moe/max_violation": float(load.max() * experts - 1),
            }
        )
    return rows


def make_run(root: Path, rows: list[dict]) -> RunDirectory:
    run = RunDirectory(root)
    run.root.mkdir()
    config = load_config("tiny-hybrid-moe", [f"train.steps={len(rows)}", "optim.clip=0.75"])
    run.config.write_text(config.to_yaml())
    sink = JsonlSink(run.metrics)
    for row in rows:
        sink.write(row)
    sink.close()
    return run


def write_report(run: RunDirectory, data_manifests: Sequence[dict] = ()) -> Path:
    history = read_history(run.metrics)
    run.report.write_text(render_page([Run(run.root.name, run, history, data_manifests)]))
    return run.report


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rows = metrics_rows(LAYERS, EXPERTS, STEPS)
    for row in rows[200:300]:
        row["moe/load"][DEAD_LAYER][DEAD_EXPERT] = 0.0
    for row in rows[209:212]:
        row["train/loss"] = math.nan
    return rows


@pytest.fixture(scope="module")
def page(tmp_path_factory, rows) -> Path:
    run = make_run(tmp_path_factory.mktemp("report") / "my-run", rows)
    for last_line in ("step 250/500", "<script>alert(1)</script>"):
        (run.folder_of(run.begin_attempt()) / "rank-0.log").write_text(f"step 1/500\n{last_line}\n")
    run.mark_done(STEPS, run.current_attempt())
    return write_report(run, [MANIFEST])


class References(HTMLParser):
    """Collects what a page would fetch, its text and its styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.policy = ""
        self.text = ""
        self.style = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        for name, value in attrs:
            if name in {"src", "srcset", "href", "action", "data", "poster", "background"}:
                is_here = tag == "a" and value.startswith("#")
                self.references += [] if is_here else [f"{tag} {name}={value}"]
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        if self._inside == "style":
            self.style += data
        elif self._inside != "script":
            self.text += f"{data} "


def bokeh_arrays(page: Path) -> list[np.ndarray]:
    """All typed arrays in the page's Bokeh document."""
    literal = re.search(r"const docs_json = '(.*)';\n", page.read_text()).group(1)
    document = json.loads(literal.replace("\\\\", "\\").replace("\\'", "'"))
    arrays = []

    def collect(node):
        if isinstance(node, dict):
            if node.get("type") == "ndarray":
                data = gzip.decompress(base64.b64decode(node["array"]["data"]))
                arrays.append(np.frombuffer(data, node["dtype"]).reshape(node["shape"]))
            else:
                for child in node.values():
                    collect(child)
        elif isinstance(node, list):
            for child in node:
                collect(child)

    collect(document)
    return arrays


def test_page_fetches_nothing(page):
    parsed = References(page.read_text())
    assert parsed.references == []
    assert "@import" not in parsed.style
    assert "url(" not in parsed.style
    assert "default-src 'none'" in parsed.policy
    assert "http" not in parsed.policy


def test_page_shows_the_numbers_of_the_run(page):
    text = re.sub(r"\s+", " ", References(page.read_text()).text)
    for shown in (
        "my-run",
        "Finished.",
        "500 of 500",
        "1.02M",
        "2.18M",
        "unigram entropy 7.213",
        "clipped to 0.75",
        "train/loss is not finite at steps 210, 211, 212",
        "What became of the 8,000 documents",
        "too few words <3 1,939 24.2%",
        "kept 6,000 75.0%",
        "step 250/500",
        "<script>alert(1)</script>",
        "attention.n_kv_heads 2",
    ):
        assert shown in text


def test_charts_hold_every_step(page, rows):
    arrays = bokeh_arrays(page)
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/aux_loss"):
        expected = np.array([row[name] for row in rows], dtype=np.float32)
        assert any(np.array_equal(array, expected, equal_nan=True) for array in arrays), name
    heat_maps = [array for array in arrays if array.dtype == np.uint8 and array.ndim == 2]
    assert [image.shape for image in heat_maps] == [(EXPERTS, STEPS)] * LAYERS
    dead = [np.argwhere(image == 0) for image in heat_maps]
    assert [len(cells) for cells in dead] == [0, 0, 100, 0]
    assert set(dead[DEAD_LAYER][:, 0]) == {DEAD_EXPERT}
    assert set(dead[DEAD_LAYER][:, 1]) == set(range(200, 300))


def test_page_stays_small_with_many_layers_experts_and_steps(tmp_path, page):
    assert page.stat().st_size < 1_700_000
    run = make_run(tmp_path / "large", metrics_rows(48, 128, 100))
    sink = JsonlSink(run.metrics)
    for step in range(101, 20_000):
        sink.write({"train/step": step, "train/loss": 1 / step, "train/grad_norm": step % 7})
    sink.close()
    assert write_report(run).stat().st_size < 4_000_000


def test_run_without_metrics_says_so(tmp_path):
    run = RunDirectory(tmp_path)
    text = References(write_report(run).read_text()).text
    assert "No metrics were logged yet." in text


def test_run_that_logged_nothing_to_draw_has_its_numbers(tmp_path):
    run = make_run(tmp_path / "bare", [{"train/step": 1, "train/tokens": 2048}])
    assert "2.05k" in References(write_report(run).read_text()).text


def test_single_step_of_a_dense_model(tmp_path):
    run = make_run(tmp_path / "one", [{"train/step": 1, "train/loss": 3.0, "train/tokens": 10}])
    page = write_report(run)
    assert "3.0000" in References(page.read_text()).text
    assert "Expert load" not in References(page.read_text()).text


@pytest.fixture(scope="module")
def shown(page, tmp_path_factory) -> Iterator[Browser]:
    """The page in a browser, drawn."""
    if IS_DISPENSABLE:
        pytest.skip("no chromium on this machine to open the page with")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        opened.open(page.as_uri())
        opened.wait_for(IS_DRAWN)
        yield opened
        assert opened.messages == []


IS_DRAWN = "window.Bokeh?.documents[0]?.is_idle && document.querySelector('.key b').textContent"
FIGURE = "Bokeh.documents[0].get_model_by_name('{}')"
LOSS = FIGURE.format("train/loss")
STEPS_SHOWN = f"[{LOSS}.x_range.start, {LOSS}.x_range.end]"


def place_in(shown: Browser, chart: str, across: float) -> tuple[float, float]:
    """A place of the window, `across` of the way from a chart's first step to its last."""
    left, right, middle = shown.js(
        f"""(() => {{
          const view = Bokeh.index.find_one({FIGURE.format(chart)})
          view.el.scrollIntoView({{ block: "center" }})
          const [box, frame] = [view.el.getBoundingClientRect(), view.frame.bbox]
          return [box.left + frame.left, box.left + frame.right, box.top + frame.vcenter]
        }})()"""
    )
    return left + across * (right - left), middle


def key_of(shown: Browser, chart: str) -> str:
    return shown.js(f"""document.querySelector('[data-chart="{chart}"] .key b').textContent""")


def test_browser_draws_the_charts_and_asks_nobody(shown, tmp_path):
    assert shown.js("performance.getEntriesByType('resource').length") == 0
    picture = tmp_path / "page.png"
    shown.resize(1440, shown.js("document.documentElement.scrollHeight"))
    shown.wait_for("!document.querySelector('.plot.unseen') && Bokeh.documents[0].is_idle")
    shown.screenshot(picture)
    shown.resize(1440, 900)
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    is_blue = (np.abs(pixels - BLUE) <= 2).all(-1)
    rows_with_lines = np.flatnonzero(is_blue.sum(-1) > 2)
    assert len(rows_with_lines) > 200, "hardly anything of the charts' colour is on the page"


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_a_phone_or_a_laptop(shown, width):
    shown.resize(width, 900)
    shown.wait_for(f"innerWidth == {width} && Bokeh.documents[0].is_idle")
    widest = shown.wait_for("document.documentElement.scrollWidth")
    shown.resize(1440, 900)
    assert widest == width


def test_numbers_are_those_at_the_pointer_in_all_charts(shown, rows):
    assert key_of(shown, "train/lr") == "0.001"
    shown.move(place_in(shown, "train/loss", 0.01))
    step = shown.wait_for("document.querySelector('#pointed').textContent")
    row = rows[int(step.removeprefix("step ")) - 1]
    for name in ("train/loss", "train/lr"):
        number = float(key_of(shown, name).replace("−", "-"))
        assert number == pytest.approx(row[name], rel=5e-3)
    shown.move((2, 2))
    shown.wait_for("document.querySelector('#pointed').textContent == ''")


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_again(shown, rows):
    whole = shown.js(STEPS_SHOWN)
    values = f"{LOSS}.y_range.end"
    highest = shown.js(values)
    start, end = (place_in(shown, "train/loss", across) for across in (0.5, 0.75))
    shown.drag(start, end)
    first, last = shown.wait_for(f"{LOSS}.x_range.start > 100 && {STEPS_SHOWN}")
    assert (first, last) == pytest.approx((0.5 * STEPS, 0.75 * STEPS), abs=0.03 * STEPS)
    assert shown.js(f"{FIGURE.format('train/lr')}.x_range.start") == first
    # The values that are left have all of the height.
    assert shown.wait_for(f"{values} < {highest} && {values}") < 4
    for _ in range(2):
        shown.click(place_in(shown, "train/loss", 0.4), times=2)
    assert shown.wait_for(f"{LOSS}.x_range.start < 100 && {STEPS_SHOWN}") == whole
    shown.wait_for(f"{values} == {highest}")


def test_smoothing_follows_its_slider(shown, rows):
    smooth = "Bokeh.documents[0].get_model_by_name('train/loss|my-run:smooth').data.value"
    of_means = shown.js(f"Array.from({smooth}, (it) => Number.isNaN(it) ? null : it)")
    losses = np.array([row["train/loss"] for row in rows])
    is_there = np.isfinite(losses)
    assert [value is not None for value in of_means] == is_there.tolist()
    late = slice(300, STEPS)
    noise = np.diff(np.array(of_means[late])).std()
    assert noise < 0.3 * np.diff(losses[late]).std()
    assert np.mean(of_means[late]) == pytest.approx(losses[late].mean(), rel=0.01)
    shown.choose("#kind", "median")
    medians = shown.js(f"Array.from({smooth}.slice(400, 410))")
    span = int(shown.js("document.querySelector('#span').textContent").split()[0])
    half = span // 2
    expected = [np.median(losses[at - half : at + half + 1]) for at in range(400, 410)]
    assert medians == pytest.approx(expected, rel=1e-5)
    shown.choose("#smoothing", "0")
    assert shown.js(f"{smooth}.length") == 0
    assert shown.js("document.querySelector('#span').textContent") == "off"


def test_a_logarithmic_scale_and_a_dark_page_are_a_click_away(shown):
    shown.js("""document.querySelector('[data-chart="train/grad_norm"] .log').click()""")
    assert shown.js(f"{FIGURE.format('train/grad_norm')}.y_scale.type") == "LogScale"
    assert shown.js(f"{LOSS}.y_scale.type") == "LinearScale"
    paper = "getComputedStyle(document.body).backgroundColor"
    shown.js("document.querySelector('[data-scheme=dark]').click()")
    assert shown.js(paper) == "rgb(20, 23, 27)"
    shown.choose("#kind", "median")
    # What was chosen outlives the page, as one that follows a run replaces itself.
    shown.js("window.is_old = true, location.reload()")
    shown.wait_for(
        f"!window.is_old && document.body && ({paper}) == 'rgb(20, 23, 27)' && {IS_DRAWN}"
    )
    shown.wait_for(f"{FIGURE.format('train/grad_norm')}.y_scale.type == 'LogScale'")
    assert shown.js("document.querySelector('#kind').value") == "median"
