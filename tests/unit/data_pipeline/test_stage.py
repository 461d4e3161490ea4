"""The files of a stage are there whole or not at all, and damage to any of them is found."""

from pathlib import Path

import pytest

from data_pipeline.stage import FILES, is_made, make_stage

CONTENT = {"a.txt": b"one", "inner/b.bin": bytes(range(256)), "empty": b""}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    make_stage(tmp_path / "stage", write)
    return tmp_path / "stage"


def test_a_stage_that_was_made_is_whole(stage: Path) -> None:
    assert is_made(stage)
    assert {name: (stage / name).read_bytes() for name in CONTENT} == CONTENT
    assert list(stage.parent.iterdir()) == [stage]


def test_a_stage_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        make_stage(tmp_path / "stage", fail)
    assert not is_made(tmp_path / "stage")
    make_stage(tmp_path / "stage", write)  # which removes what the failed one has left
    assert is_made(tmp_path / "stage")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_two_that_make_a_stage_at_a_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    def write_while_another_does_it_all(folder: Path) -> None:
        (folder / "first.txt").write_text("here before the other one began")
        make_stage(tmp_path / "stage", write)
        assert (folder / "first.txt").exists()

    make_stage(tmp_path / "stage", write_while_another_does_it_all)
    assert is_made(tmp_path / "stage")
    assert not (tmp_path / "stage" / "first.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


@pytest.mark.parametrize("name", [*(name for name in CONTENT if CONTENT[name]), FILES])
def test_every_byte_counts(stage: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = (stage / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 2):
        make_stage(stage.parent / "copy", write)
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        (stage.parent / "copy" / name).write_bytes(damaged)
        assert not is_made(stage.parent / "copy")
        assert f"copy/{name} is damaged" in capsys.readouterr().err
        assert not (stage.parent / "copy").exists()


@pytest.mark.parametrize("name", [*CONTENT, FILES])
def test_a_missing_file_is_named(
    stage: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage / name).unlink()
    assert not is_made(stage)
    assert name in capsys.readouterr().err
    assert not stage.exists()
