"""What a page says beside its charts."""

import re
from html import unescape
from itertools import pairwise

import pytest

from pretrain.metrics.history import read_history
from pretrain.metrics.report import Run, fragments
from tests.unit.pretrain.metrics.report.report_cases import make_run, write_json

EXAMPLE = {
    "id": "<urn:uuid:1>",
    "url": "https://example.org/<b>",
    "detail": "2 words",
    "score": None,
    "twin": None,
    "jaccard": None,
    "excerpt": "<script>alert(1)</script>",
}
FUNNEL = [
    {
        "source": "web",
        "documents": 60,
        "tokens": 12_345,
        "steps": [
            {
                "step": "quality",
                "documents_in": 80,
                "documents_out": 60,
                "bytes_in": 4000,
                "bytes_out": 3000,
                "dropped": [
                    {"reason": "word count", "documents": 16, "examples": [EXAMPLE]},
                    {
                        "reason": "harmful",
                        "documents": 4,
                        "examples": [EXAMPLE | {"excerpt": None, "score": 0.25}],
                    },
                ],
            },
            {
                "step": "shards",
                "documents_in": 60,
                "documents_out": 60,
                "bytes_in": 3000,
                "bytes_out": None,
                "dropped": [],
                "kept": {"documents": 60, "examples": [EXAMPLE | {"excerpt": "kept text"}]},
            },
        ],
    }
]


def text(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_lost_time_is_a_waterfall_that_ends_at_all_of_it(tmp_path):
    lost = {"between attempts": 30.0, "checkpoints": 10.0, "evaluation": 0.0}
    row = {"train/step": 9, "perf/productive_s": 3560.0, "perf/lost_s": lost}
    html = fragments([make_run(tmp_path / "run", [row])])["lost-time"]
    assert "Of 1 h 0 min since the run began, 59 min 20 s went into steps" in text(html)
    assert "between attempts 30.0 s 0.8 % checkpoints 10.0 s 0.3 %" in text(html)
    assert "evaluation" not in html
    bars = [
        (float(left), float(width))
        for left, width in re.findall(r"margin-left: ([\d.]+)%; width: ([\d.]+)%", html)
    ]
    for (left, width), (following, _) in pairwise(bars):
        assert abs(left + width - following) < 0.002
    assert abs(sum(bars[-1]) - 100) < 0.002


def test_events_are_where_the_counts_of_the_guard_rise(tmp_path):
    skipped = [0, 1, 1, 3, 0, 1]
    rows = [{"train/step": step, "guard/skipped": n} for step, n in enumerate(skipped, 1)]
    run = make_run(tmp_path / "run", rows)
    number = run.directory.begin_attempt()
    (run.directory.folder_of(number) / "changes.jsonl").write_text(
        '{"setting": "optim.lr", "before": 1, "now": 2}\n{"half'
    )
    told = text(fragments([run])["events"])
    assert "2 a batch was skipped 4 2 batches were skipped 6 a batch was skipped" in told
    assert "attempt 1 changed optim.lr: 1 → 2" in told


def test_attempts_say_what_they_died_of_and_how_they_were_spread(tmp_path):
    run = make_run(tmp_path / "run", [])
    number = run.directory.begin_attempt()
    write_json(run.directory.ranks_of(number), {"ranks": 8, "layout": "pp=2 cp=1 ep=4"})
    write_json(run.directory.failure_of(number), {"error": "rank 3: killed by signal 9"})
    told = text(fragments([run])["attempts"])
    assert "0001 8 pp=2 ep=4" in told
    assert told.endswith("rank 3: killed by signal 9")


def test_what_an_attempt_died_of_is_told_also_after_the_next_has_begun(tmp_path):
    run = make_run(tmp_path / "run", [])
    first = run.directory.begin_attempt()
    run.directory.begin_attempt()
    for _ in range(2):
        assert "rank 3" not in text(fragments([run])["attempts"])
    write_json(run.directory.failure_of(first), {"error": "rank 3: killed by signal 9"})
    assert "rank 3: killed by signal 9" in text(fragments([run])["attempts"])


def test_the_funnel_shows_examples_as_text_and_withholds_what_it_must(tmp_path):
    run = make_run(tmp_path / "run", [])
    write_json(run.directory.funnel, FUNNEL)
    html = fragments([run])["funnel"]
    assert "<script>" not in html
    told = text(html)
    assert "Of 80 documents in 4.00 kB of archives 60 were kept: 12,345 tokens." in told
    assert "quality 60 −20 3.00 kB" in told
    assert "word count 16 20.0 % harmful 4 5.0 %" in told
    assert "https://example.org/<b> (2 words) <script>alert(1)</script>" in told
    assert "(2 words; score 0.25) The text is withheld" in told
    assert "kept text" in told


def test_runs_on_the_same_data_show_its_funnel_once(tmp_path):
    runs = [make_run(tmp_path / name, []) for name in ("a", "b", "c")]
    other = [FUNNEL[0] | {"source": "books", "documents": 50}]
    for run, funnel in zip(runs, (FUNNEL, FUNNEL, other), strict=True):
        write_json(run.directory.funnel, funnel)
    told = text(fragments(runs)["funnel"])
    assert "60 were kept; 50 of them are trained on: 12,345 tokens" in told
    assert (told.count("web : Of 80"), told.count("books : Of 80")) == (1, 1)


def test_several_runs_are_compared(tmp_path):
    rows = [{"train/step": 1, "train/loss": 2.5}]
    runs = [
        make_run(tmp_path / name, rows, [f"optim.lr={lr}"]) for name, lr in (("a", 1), ("b", 2))
    ]
    found = fragments(runs)
    assert "a 1 2.5000" in text(found["headline"])
    assert text(found["settings"]) == (
        "The runs differ in these settings. setting a b optim.lr 1.0 2.0"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_no_password_of_an_address_is_shown(tmp_path, count):
    runs = []
    for name in ("a", "b")[:count]:
        run = make_run(tmp_path / name, [])
        address = f"s3://user:secret@host/{name}?X-Amz-Signature=secret"
        shards = f"data: {{shards: [{{path: '{address}'}}], cache: '{address}'}}"
        run.directory.config.write_text(shards)
        number = run.directory.begin_attempt()
        change = {"setting": "data.shards", "before": [{"path": address}], "now": address}
        write_json(run.directory.folder_of(number) / "changes.jsonl", change)
        runs.append(run)
    found = fragments(runs)
    assert "s3://host/a" in text(found["settings"])
    assert "s3://host/a" in text(found["events"])
    assert "secret" not in "".join(found.values())


def test_damaged_lines_and_another_version_are_no_reason_to_fail(tmp_path):
    run = make_run(tmp_path / "run", [{"train/step": 1, "train/loss": 2.5}])
    with run.directory.metrics.open("a") as file:
        file.write('{"train/step": 2, "train/lo\n{"train/step": 3, "train/loss": 2.0}\n')
    run.directory.config.write_text("train: {steps: 7}\nwarmth: {high: 3}\n")
    again = Run("run", run.directory, read_history(run.directory.metrics))
    found = fragments([again])
    assert "1 line is no JSON and left out, the first of them line 2" in text(found["alarms"])
    assert "Steps 3 of 7" in text(found["headline"])
    assert "warmth high 3" in text(found["settings"])


def test_a_table_of_scores_stands_in_the_page(tmp_path):
    run = make_run(tmp_path / "run", [])
    score = {
        "task": "arithmetic",
        "metric": "acc",
        "filter": "none",
        "shots": 5,
        "value": 0.5,
        "stderr": 0.1,
        "chance": 0.25,
        "higher_is_better": True,
        "samples": 20,
        "version": "1",
        "harness": "0.4",
        "max_length": 64,
        "truncated": 0,
        "requests": 80,
    }
    write_json(run.directory.evaluation("lm-eval", 30), {"step": 30, "rows": [score]})
    told = text(fragments([run])["evaluations"])
    assert "step 30 task chance 5 shots arithmetic acc 25.0% 50.0% ± 10.0%" in told


def test_accuracy_over_examples_is_a_curve_for_each_task(tmp_path):
    run = make_run(tmp_path / "run", [])
    accuracy = {("copy", 0): 0.25, ("copy", 4): 1.0, ("reversal", 0): 0.25, ("reversal", 4): 0.5}
    cells = [
        {"task": task, "shots": shots, "accuracy": share, "low": 0.1, "high": 1.0, "chance": 0.25}
        for (task, shots), share in accuracy.items()
    ]
    request = {"tasks": ["copy", "reversal"], "shots": [0, 4], "samples": 8}
    tree = {"step": 7, "form": "tokens", "request": request, "cells": cells}
    write_json(run.directory.evaluation("icl", 7), tree)
    html = fragments([run])["evaluations"]
    assert "copy, 4 shots: 100 %" in html
    heights = re.findall(r'<polyline points="[\d.]+,([\d.]+) [\d.]+,([\d.]+) "', html)
    (copy, reversal) = [(float(first), float(last)) for first, last in heights]
    # Downwards on the page, from 168 for nothing to 8 for all.
    assert copy == (128, 8)
    assert reversal == (128, 88)
