"""One attempt at a time changes a run directory."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from pretrain import run_dir
from pretrain.config import read_run_config
from pretrain.errors import AttemptError, FencedError, TrainingError, UserError
from pretrain.run_dir import RunDirectory, WriteError, write_atomically
from tests.disks import files_of_at_most, flock_of_nfs4


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    root = tmp_path / "run"
    root.mkdir()
    return RunDirectory(root)


def test_attempts_are_counted_and_each_fences_off_those_before(run: RunDirectory) -> None:
    assert run.current_attempt() == 0
    first = run.begin_attempt()
    run.check_attempt(first)
    run.mark_stopped(3, first, "SIGTERM")
    stopped = json.loads(run.stopped.read_text())
    assert (stopped["step"], stopped["attempt"], stopped["reason"]) == (3, 1, "SIGTERM")

    second = run.begin_attempt()
    assert (first, second, run.current_attempt()) == (1, 2, 2)
    assert not run.stopped.exists()
    for change in (
        lambda: run.check_attempt(first),
        lambda: run.mark_done(9, first),
        lambda: run.mark_stopped(9, first, "SIGTERM"),
    ):
        with pytest.raises(FencedError, match=r"attempt 2 of .*/run has begun.*attempt 1"):
            change()
    assert not run.done.exists()
    assert not run.stopped.exists()
    run.mark_done(9, second)
    assert json.loads(run.done.read_text()) == {"step": 9, "attempt": 2}


def test_an_attempt_whose_launcher_was_overtaken_does_not_begin(run: RunDirectory) -> None:
    slow, fast = run.new_attempt(), run.new_attempt()
    assert run.current_attempt() == 0
    run.begin_attempt(fast)
    with pytest.raises(FencedError, match=r"attempt 2 of .* has begun"):
        run.begin_attempt(slow)
    run.check_attempt(fast)


def test_an_attempt_that_began_between_check_and_rename_keeps_the_file_as_it_is(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.begin_attempt()
    rename = run_dir._put_into_place

    def after_the_check(aside: Path, path: Path, text: str) -> None:
        if path == run.done:
            monkeypatch.setattr(run_dir, "_put_into_place", rename)
            run.begin_attempt()
        rename(aside, path, text)

    monkeypatch.setattr(run_dir, "_put_into_place", after_the_check)
    with pytest.raises(FencedError):
        run.mark_done(9, first)
    assert not run.done.exists()


def test_a_directory_that_has_vanished_is_named(run: RunDirectory) -> None:
    attempt = run.begin_attempt()
    shutil.rmtree(run.root)
    with pytest.raises(TrainingError, match=r"the run directory .*/run is gone"):
        run.check_attempt(attempt)
    with pytest.raises(TrainingError, match=r"the run directory .*/run is gone"):
        run.mark_done(9, attempt)
    assert not run.root.exists()


@contextmanager
def held_by_another(run: RunDirectory, attempt: str = "") -> Iterator[int]:
    """Another process holds the directory; its id."""
    hold = (
        "import sys; from pathlib import Path; from pretrain.run_dir import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).exclusive():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run.root)],
        env=os.environ | {"FARSPAN_ATTEMPT": attempt},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield holder.pid
        holder.communicate()


def test_who_holds_the_directory_is_named(run: RunDirectory) -> None:
    with (
        held_by_another(run) as holder,
        pytest.raises(UserError, match=f"is in use by process {holder} on"),
        run.exclusive(),
    ):
        pass
    with run.exclusive():
        pass


@pytest.mark.parametrize("flock", [fcntl.flock, flock_of_nfs4])
def test_the_directory_is_taken_from_an_attempt_that_is_out_of_reach_and_from_no_other(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, flock: Callable[[IO[bytes], int], None]
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    assert run.take_from(1) is None
    with run.exclusive():
        assert run.take_from(1) is None
    with held_by_another(run, attempt="11") as holder:
        assert run.take_from(1) is None
        taken = run.take_from(11)
        assert taken is not None
        assert taken.startswith(f"process {holder} on ")
        with run.exclusive(), pytest.raises(UserError, match=f"process {os.getpid()} on"):
            run.exclusive().__enter__()


NOBODY = 65534


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_directory_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        run.root.chmod(0o555)
        with (
            without_privileges(),
            pytest.raises(UserError, match=f"{folder}/lock cannot be written: Permission denied"),
            run.exclusive(),
        ):
            pass
        assert not list(run.root.iterdir())


def test_a_fault_of_the_file_system_is_no_mistake_of_the_user(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attempt, perhaps on another node, can do what this one could not."""
    run.config.write_text("model: {}\n")

    def fail(path: Path, *arguments: object, **named: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        patch.setattr(Path, "read_text", fail)
        for read in (lambda: read_run_config(run), lambda: run.exclusive().__enter__()):
            with pytest.raises(AttemptError, match="Input/output error"):
                read()


def test_a_full_disk_is_told_with_the_name_of_the_file_and_leaves_what_was_there(
    run: RunDirectory,
) -> None:
    attempt = run.begin_attempt()
    run.mark_saved(4, attempt, "checkpoints")
    before = {path: path.read_bytes() for path in run.root.glob("*.json")}
    for path, write in (
        (run.saved, lambda: run.mark_saved(8, attempt, "checkpoints")),
        (run.done, lambda: run.mark_done(8, attempt)),
        (run.stopped, lambda: run.mark_stopped(8, attempt, "SIGTERM")),
        (run.attempt, run.begin_attempt),
        (run.config, lambda: write_atomically(run.config, "model:")),
        (run.root / "lock", run.exclusive().__enter__),
        (run.root / "launcher.lock", run.launching().__enter__),
    ):
        told = rf"^{path} cannot be written: File too large\..*with room left.*newest checkpoint"
        with files_of_at_most(0), pytest.raises(WriteError, match=told):
            write()
    assert {path: path.read_bytes() for path in run.root.glob("*.json")} == before
    assert not [path for path in run.root.iterdir() if path.name.startswith(".")]
    assert list(run.aside(attempt).iterdir()) == []
    with run.exclusive():
        run.mark_done(8, attempt)


def test_a_log_without_room_is_told_although_its_error_names_no_file(run: RunDirectory) -> None:
    unnamed = OSError(errno.ENOSPC, "No space left on device")
    assert run.is_cause_of(unnamed)
    assert f"such as a log in {run.attempts}, cannot be written: No space" in run.explain(unnamed)
    assert not run.is_cause_of(OSError(errno.EPIPE, "Broken pipe"))
    assert not run.is_cause_of(OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file"))


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("pretrain.run_dir.fcntl.flock", refuse)
    with RunDirectory(tmp_path).exclusive():
        assert "has no locks (Function not implemented)" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_not_there_does_not_begin_anew(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.refuse_to_begin_anew("elsewhere")
    attempt = run.begin_attempt()
    run.mark_saved(8, attempt, "/mnt/checkpoints")
    with pytest.raises(UserError, match="no checkpoint in elsewhere, but the run has saved step 8"):
        run.refuse_to_begin_anew("elsewhere")
