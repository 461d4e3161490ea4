"""Where an export goes, looked at before gigabytes are read."""

from pathlib import Path

import pytest

from launch.train import prepare
from pretrain.checkpoint.export import export_newest
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def test_a_place_that_cannot_be_is_refused_before_a_checkpoint_is_read(
    shards: Path, tmp_path: Path
) -> None:
    run = prepare("tiny", [f"data.shards={shards}"], 1, tmp_path / "run")
    checkpoint = run.checkpoints / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    file = tmp_path / "file"
    file.touch()
    for out in (file / "out", Path("/proc/out")):
        with pytest.raises(UserError, match=rf"--out {out}: nothing can be written there \("):
            export_newest(run, out)


def test_no_folder_is_made_for_what_is_no_run_or_has_no_checkpoint(
    shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exports" / "one"
    with pytest.raises(UserError, match="is not a run directory"):
        export_newest(RunDirectory(tmp_path), out)
    run = prepare("tiny", [f"data.shards={shards}"], 1, tmp_path / "run")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export_newest(run, out)
    assert not out.parent.exists()
