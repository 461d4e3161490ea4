"""What a run leaves behind when it ends."""

from pathlib import Path

import pytest

from launch.train import try_to_report
from pretrain.config import load_config
from pretrain.run_dir import RunDirectory


def test_a_report_that_cannot_be_made_is_told_and_changes_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(load_config("tiny", []).to_yaml())
    run.evaluations.mkdir()
    run.evaluation("long", 9).write_text("{}")
    try_to_report(run)
    told = capsys.readouterr()
    assert "warning: no report: KeyError('request')" in told.err
    assert told.out == ""
