"""Folders beside a path: one's own, and what killed processes have left."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.scratch import scratch_folder
from tests.ranks import ROOT

KILLED = """
import os, signal, sys
from pathlib import Path
from pretrain.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.notes").mkdir()
    with scratch_folder(out) as first:
        command = [sys.executable, "-c", KILLED, str(out)]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 3
        with scratch_folder(out) as second:
            assert len(list(tmp_path.iterdir())) == 3
            assert first.is_dir(), "its process lives"
            assert first != second
            # As any folder that is made, and not for its owner alone.
            assert second.stat().st_mode == (tmp_path / ".out.notes").stat().st_mode
            second.rename(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.notes", "out"]


def test_what_a_process_on_another_machine_has_made_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock may be one that only that machine sees."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        with scratch_folder(out):
            assert len(list(tmp_path.iterdir())) == 2
    with scratch_folder(out):
        assert len(list(tmp_path.iterdir())) == 1


def test_an_error_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space"), scratch_folder(tmp_path / "out"):
        raise OSError("no space left on device")
    assert not list(tmp_path.iterdir())
