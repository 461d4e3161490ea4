import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.metrics.definitions import DEFINITIONS
from pretrain.metrics.registry import METRICS, as_markdown, check_names

PAGE = Path(__file__).resolve().parents[4] / "docs" / "metrics.md"


def test_unregistered_name_is_refused_and_the_nearest_is_named():
    check_names(["train/loss", "moe/load"])
    with pytest.raises(ValueError, match=r"'train/los' is not registered .*'train/loss'"):
        check_names(["train/step", "train/los"])


def test_documentation_is_current():
    assert PAGE.read_text() == as_markdown(), "run: python -m pretrain.metrics.registry"


def test_documentation_table_has_one_whole_row_per_metric():
    rows = [line for line in as_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS)
    assert all(row.count("|") == 7 for row in rows)


def test_each_name_is_defined_once():
    assert len(METRICS) == len(DEFINITIONS)


def test_sources_are_files_of_ours():
    root = PAGE.parents[1]
    assert [m.name for m in DEFINITIONS if not (root / m.source).is_file()] == []


def test_metrics_need_neither_torch_nor_wandb():
    script = (
        "import sys, pretrain.metrics.registry, pretrain.metrics.sinks;"
        "print(sorted({'torch', 'wandb', 'bokeh'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
