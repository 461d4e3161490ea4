"""A folder of checkpoints that two runs are told to save to."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.train import prepare
from pretrain.checkpoint.owner import claim, refuse_anothers
from pretrain.checkpoint.store import saved_steps
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.config import read_run_config
from pretrain.errors import UserError
from pretrain.recorder import Recorder
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer


def trainer_of(run: RunDirectory) -> Trainer:
    return Trainer(read_run_config(run), run, torch.device("cpu"), run.begin_attempt())


def settings_of(shards: Path, folder: Path) -> list[str]:
    settings = [f"data.shards={shards}", f"checkpoint.dir={folder}", "checkpoint.keep=1"]
    return [*settings, "data.seq_len=64", "train.global_batch=2", "wandb.mode=disabled"]


def test_the_checkpoints_of_another_run_are_left_alone(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings = settings_of(shards, folder)
    first, second = (prepare("tiny", settings, 1, tmp_path / name) for name in ("one", "two"))

    trainer = trainer_of(first)
    trainer.step(stop_requested=False)
    trainer.save(is_last=True)
    with pytest.raises(UserError, match=rf"has the checkpoints of another run, {first.root}: "):
        trainer_of(second)
    assert saved_steps(Target(str(folder))) == [1]

    # A copy of a run has none of its own, a run that is moved has.
    copied = RunDirectory(shutil.copytree(first.root, tmp_path / "copied"))
    with pytest.raises(UserError, match=rf"has the checkpoints of another run, {first.root}: "):
        trainer_of(copied)
    first.root.rename(tmp_path / "moved")
    moved = RunDirectory(tmp_path / "moved")
    assert trainer_of(moved).progress.step == 1
    assert checkpoints_of(read_run_config(moved), moved) == Target(str(folder))


def test_a_fork_goes_on_from_a_copy_of_the_checkpoints(shards: Path, tmp_path: Path) -> None:
    folders = tmp_path / "checkpoints", tmp_path / "copied-checkpoints"
    run = prepare("tiny", settings_of(shards, folders[0]), 1, tmp_path / "run")
    trainer = trainer_of(run)
    trainer.step(stop_requested=False)
    trainer.save(is_last=True)

    shutil.copytree(run.root, tmp_path / "fork")
    shutil.copytree(*folders)

    def saving_to(folder: Path, directory: Path) -> RunDirectory:
        return prepare("tiny", settings_of(shards, folder), 1, directory, ["checkpoint.dir"])

    fork = saving_to(folders[1], tmp_path / "fork")
    assert trainer_of(fork).progress.step == 1
    # From now on these are its own.
    run = saving_to(folders[1], run.root)
    with pytest.raises(UserError, match=rf"has the checkpoints of another run, {fork.root}: "):
        trainer_of(run)
    run = saving_to(folders[0], run.root)
    assert trainer_of(run).progress.step == 1


def test_what_was_claimed_before_its_first_checkpoint_is_left_alone(
    shards: Path, tmp_path: Path
) -> None:
    settings = [f"data.shards={shards}", f"checkpoint.dir={tmp_path / 'checkpoints'}"]
    first, second = (prepare("tiny", settings, 1, tmp_path / name) for name in ("one", "two"))
    trainer_of(first)
    with pytest.raises(UserError, match=r"Name another checkpoint\.dir; or, if that"):
        trainer_of(second)
    (tmp_path / "checkpoints" / "run.json").unlink()
    trainer_of(second)
    with pytest.raises(UserError, match=rf"of another run, {second.root}: "):
        trainer_of(first)


def test_a_run_that_is_made_anew_is_told_how_to_begin_and_how_to_go_on(
    shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    run = prepare("tiny", settings_of(shards, folder), 1, tmp_path / "run")
    trainer = trainer_of(run)
    trainer.step(stop_requested=False)
    trainer.save(is_last=True)
    shutil.rmtree(run.root)

    prepare("tiny", settings_of(shards, folder), 1, run.root)
    told = rf"of an earlier run in {run.root}: .* gone for good, remove {folder} to begin anew"
    with pytest.raises(UserError, match=told) as refused:
        trainer_of(run)
    found = re.search(r"write (\w+) to (\S+) to go on from them", str(refused.value))
    assert found
    Path(found[2]).write_text(found[1])
    assert trainer_of(run).progress.step == 1

    shutil.rmtree(run.root)
    shutil.rmtree(folder)
    prepare("tiny", settings_of(shards, folder), 1, run.root)
    assert trainer_of(run).progress.step == 0


def test_checkpoints_that_no_run_has_claimed_are_those_of_a_run_that_has_trained(
    shards: Path, tmp_path: Path
) -> None:
    """As older versions have left them."""
    folder = tmp_path / "checkpoints"
    first, second = (
        prepare("tiny", settings_of(shards, folder), 1, tmp_path / name) for name in ("one", "two")
    )
    trainer = trainer_of(first)
    trainer.step(stop_requested=False)
    trainer.save(is_last=True)
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match=r"has a checkpoint of step 1, and no run\.json says"):
        trainer_of(second)
    assert saved_steps(Target(str(folder))) == [1]
    Recorder(first, first.current_attempt(), trainer, read_run_config(first)).close()
    assert trainer_of(first).progress.step == 1


def test_of_two_runs_that_claim_a_folder_at_once_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(str(tmp_path / "checkpoints"))
    runs = [RunDirectory(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        run.root.mkdir()
    commit = Target.commit

    def commit_after_the_other(place: Target, content: bytes, check: Callable[[], None]) -> None:
        monkeypatch.setattr(Target, "commit", commit)
        place.commit(content, check)
        # It found no claim either.
        (target / "run.json").remove()
        claim(target, runs[1], lambda: None)

    monkeypatch.setattr(Target, "commit", commit_after_the_other)
    with pytest.raises(UserError, match=rf"has the checkpoints of another run, {runs[1].root}: "):
        claim(target, runs[0], lambda: None)
    refuse_anothers(target, runs[1])


def test_the_checkpoints_in_the_directory_of_another_run_are_left_alone(
    shards: Path, tmp_path: Path
) -> None:
    """That one claims nothing, and looks for no claim."""
    folder = tmp_path / "one" / "checkpoints"
    settings = settings_of(shards, folder)
    first = prepare("tiny", [*settings, "checkpoint.dir=null"], 1, tmp_path / "one")
    second = prepare("tiny", settings, 1, tmp_path / "two")
    with pytest.raises(UserError, match=rf"is where another run, {first.root}, saves: "):
        trainer_of(second)
    assert not (folder / "run.json").exists()
    first = prepare("tiny", settings, 1, first.root, ["checkpoint.dir"])
    assert trainer_of(first).progress.step == 0


@pytest.mark.parametrize("content", [b"", b'{"run": "0123', b"\xff", b"[1]", b'{"run": "a"}'])
def test_a_file_that_names_no_run_is_named(content: bytes, tmp_path: Path) -> None:
    place = tmp_path / "run.json"
    place.write_bytes(content)
    with pytest.raises(UserError, match=rf"{place} does not say whose checkpoints lie there \("):
        refuse_anothers(Target(str(tmp_path)), RunDirectory(tmp_path / "run"))
