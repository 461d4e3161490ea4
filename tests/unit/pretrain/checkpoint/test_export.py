"""Where an export goes, looked at before gigabytes are read."""

from pathlib import Path

import pytest

from pretrain.checkpoint.export import export_newest
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def test_a_place_that_cannot_be_is_refused_before_the_run_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file / "out", Path("/proc/out")):
        with pytest.raises(UserError, match=rf"--out {out}: nothing can be written there \("):
            export_newest(RunDirectory(tmp_path), out)
