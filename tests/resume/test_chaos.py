"""The benchmark that kills runs, with as many kills as CI has time for."""

import subprocess
import sys

import pytest

from bench.chaos import COLUMNS, KINDS
from pretrain.config import load_config
from pretrain.layouts import resolve_layout
from tests.ranks import ROOT


@pytest.mark.slow
def test_nothing_is_lost_in_ten_kills() -> None:
    command = (sys.executable, "-m", "bench.chaos", "--kills", "10", "--goodput-kills", "0")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    rows = {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in lines[2:]}
    assert rows.keys() == {"all", *(kind.name for kind in KINDS)}
    total = rows["all"]
    start = COLUMNS.index("runs") + 1
    moments = COLUMNS[start : COLUMNS.index("restarts")]
    assert sum(int(total[moment]) for moment in moments) == 10
    assert (total["ledger exact"], total["half checkpoints"]) == ("yes", "0")
    assert rows["experts, same layout"]["loss deviation"] == "bitwise"
    for kind in KINDS[1:]:
        assert float(rows[kind.name]["loss deviation"]) <= 1e-5


def test_each_axis_changes_and_no_run_is_longer_than_equal_losses_are_promised() -> None:
    for kind in KINDS:
        for layout in kind.layouts:
            settings = (*kind.settings, *layout[2:])
            resolve_layout(load_config("tiny-hybrid-moe", settings), int(layout[1]))
    for kind in KINDS[1:]:
        ranks = {layout[1] for layout in kind.layouts}
        axes = {setting.partition("=")[0] for layout in kind.layouts for setting in layout[2:]}
        assert ranks == {"1", "2", "4"}
        assert {"parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp_replicate"} <= axes
        assert kind.tolerance <= 1e-5
    dense, experts = KINDS[1:]
    assert dense.steps <= 20
    assert experts.steps <= 6
    assert any("parallel.ep=4" in layout for layout in experts.layouts)
