"""A checkpoint folder is whole or its damage is named."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import (
    MANIFEST,
    describe_files,
    find_damage,
    list_files,
    write_manifest,
)
from pretrain.checkpoint.store import newest_whole, saved_steps
from pretrain.errors import UserError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, 8)


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(256)) * 64)
    (path / "inner" / "progress.json").write_text('{"step": 8}')
    write_manifest(path, describe_files(path, list_files(path)))
    return path


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_fresh_checkpoint_is_whole(checkpoint: Path) -> None:
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("name", ["weights", "inner/progress.json"])
def test_a_flipped_byte_is_named(checkpoint: Path, name: str) -> None:
    flip_a_byte(checkpoint / name)
    assert name in str(find_damage(checkpoint))
    assert "sha256" in str(find_damage(checkpoint))


def test_a_file_cut_in_half_is_named_with_its_sizes(checkpoint: Path) -> None:
    content = (checkpoint / "weights").read_bytes()
    (checkpoint / "weights").write_bytes(content[: len(content) // 2])
    damage = str(find_damage(checkpoint))
    assert "8192 bytes" in damage
    assert "16384" in damage


def test_parts_share_the_files_between_them(checkpoint: Path) -> None:
    flip_a_byte(checkpoint / "weights")
    found = [find_damage(checkpoint, part, 2) for part in range(2)]
    assert sum(damage is not None for damage in found) == 1


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "weights").unlink()
    assert "weights is missing" in str(find_damage(checkpoint))


@pytest.mark.parametrize("text", ["", "{", json.dumps({"other": 1}), json.dumps({"files": ["a"]})])
def test_a_damaged_manifest_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert MANIFEST in str(find_damage(checkpoint))


def test_the_newest_whole_checkpoint_is_chosen_and_the_damage_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (8, 16, 24):
        make_checkpoint(tmp_path, step)
    flip_a_byte(tmp_path / "step-00000024" / "weights")
    (tmp_path / "step-00000032.bak").mkdir()
    assert newest_whole(tmp_path, saved_steps(tmp_path)) == 16
    assert "step 24" in capsys.readouterr().err


def test_no_checkpoint_is_not_damage_but_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert newest_whole(tmp_path, saved_steps(tmp_path)) is None
    flip_a_byte(make_checkpoint(tmp_path, 8) / "weights")
    with pytest.raises(UserError, match="weights"):
        newest_whole(tmp_path, saved_steps(tmp_path))
