"""Where an export goes, looked at before gigabytes are read."""

from pathlib import Path

import pytest

from pretrain.checkpoint.export import export_newest
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def test_a_place_below_a_file_is_refused_before_the_run_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"--out .*file/out: .*file cannot be made a folder"):
        export_newest(RunDirectory(tmp_path), file / "out")
