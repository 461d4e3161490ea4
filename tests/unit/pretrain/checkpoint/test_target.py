"""Folders on this machine and in an object store behave alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.store import checkpoint_in, saved_steps
from pretrain.checkpoint.target import Target
from pretrain.errors import AttemptError, UserError
from tests.unit.pretrain.checkpoint.conftest import Saved


@pytest.fixture(params=["local", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    if request.param == "local":
        return Target(str(tmp_path / "run"))
    return Target(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_a_file_is_there_once_it_is_committed(target: Target) -> None:
    file = target / "file"
    target.make()
    assert target.names() == []
    assert not file.exists()
    file.commit(b"first", lambda: None)
    file.commit(b"second", lambda: None)
    assert (file.read(), file.size(), target.names()) == (b"second", 6, ["file"])


def test_what_may_not_be_committed_changes_nothing(target: Target) -> None:
    def refuse() -> None:
        raise PermissionError

    target.make()
    (target / "file").commit(b"old", lambda: None)
    with pytest.raises(PermissionError):
        (target / "file").commit(b"new", refuse)
    assert (target / "file").read() == b"old"
    assert target.names() == ["file"]


def test_a_file_that_could_not_be_filled_is_not_there(target: Target) -> None:
    def fill(file: Any) -> None:
        file.write(b"half")
        raise OSError("no more")

    target.make()
    with pytest.raises((OSError, AttemptError), match="no more"):
        (target / "file").create(fill)
    assert not (target / "file").exists()


def test_what_is_not_there_is_told_as_such(target: Target) -> None:
    missing = target / "missing"
    for ask in (missing.size, missing.read, missing.open):
        with pytest.raises(FileNotFoundError):
            ask()
    assert missing.names() == []
    missing.remove()


def test_checkpoints_are_saved_loaded_retained_and_their_damage_found(target: Target) -> None:
    saved, values = Saved(target), {}
    for step in (1, 2, 3):
        saved.train()
        saved.save(step)
        values[step] = saved.values()
    assert saved_steps(target) == [2, 3]
    newest = checkpoint_in(target, 3)
    (file,) = (name for name in newest.names() if name.endswith(".safetensors"))
    content = bytearray((newest / file).read())
    content[-5] ^= 1
    (newest / file).commit(bytes(content), lambda: None)
    successor = Saved(target, attempt=2)
    assert successor.load().step == 2
    assert all(map(torch.equal, successor.values(), values[2]))
    assert saved_steps(target) == [2]


def test_a_file_system_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="gopher://x is on no file system"):
        Target("gopher://x").names()


def test_a_store_that_cannot_be_reached_says_nothing_of_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    saved = Saved(Target(f"{bucket}/unreachable"))
    saved.save(1)
    client = saved.target._place[0]

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the store")

    for name in ("cat_file", "info", "pipe_file", "_pipe_file"):
        monkeypatch.setattr(client, name, refuse)
    with pytest.raises(AttemptError, match="cannot be reached: no route to the store"):
        saved.load()
    assert not saved.save(2)
    monkeypatch.undo()
    assert saved_steps(saved.target) == [1]
