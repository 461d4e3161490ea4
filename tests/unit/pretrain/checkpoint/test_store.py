"""A checkpoint is complete or absent, and what is damaged is named and not used."""

import errno
import json
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from pretrain.checkpoint.manifest import (
    MANIFEST,
    DamageError,
    Manifest,
    check_files,
    read_index,
)
from pretrain.checkpoint.store import (
    CheckpointStore,
    Retention,
    check_alone,
    checkpoint_in,
    saved_steps,
)
from pretrain.checkpoint.target import Target
from pretrain.config import OptimConfig
from pretrain.errors import AttemptError, TrainingError, UserError
from pretrain.optim import build_optimizer
from tests.unit.pretrain.checkpoint.conftest import Saved


def folder(saved: Saved, step: int) -> Path:
    return Path(str(checkpoint_in(saved.target, step)))


def only_file(saved: Saved, step: int) -> Path:
    (file,) = folder(saved, step).glob("*.safetensors")
    return file


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def test_loading_restores_everything_bitwise(saved: Saved) -> None:
    saved.train()
    at_save = saved.values()
    saved.save(3)
    saved.train()
    assert not equal(saved.values(), at_save)
    progress = saved.load()
    assert equal(saved.values(), at_save)
    assert progress is not None
    assert (progress.step, progress.tokens, progress.stream) == (3, 30, {"cursor": 3})


def test_moments_in_bfloat16_come_back_bitwise_and_go_on_in_either_type(saved: Saved) -> None:
    half = OptimConfig(state_dtype="bfloat16")
    rounded = Saved(saved.target, optim=half)
    rounded.train()
    at_save = rounded.values()
    assert torch.bfloat16 in {value.dtype for value in at_save}
    rounded.save(1)
    rounded.train()
    rounded.load()
    assert equal(rounded.values(), at_save)
    # Every bfloat16 is a float32, which is rounded on the way back.
    saved.load()
    assert equal(saved.values(), [value.float() for value in at_save])
    saved.train()
    exact = saved.values()
    saved.save(2)
    rounded.load()
    expected = [a.to(b.dtype) for a, b in zip(exact, at_save, strict=True)]
    assert equal(rounded.values(), expected)


def test_what_is_saved_is_what_was_there_when_the_save_began(saved: Saved) -> None:
    saved.train()
    at_save = saved.values()
    saved.begin(1)
    saved.train()
    saved.store.finish_save()
    saved.load()
    assert equal(saved.values(), at_save)


def test_there_is_no_checkpoint_before_the_first(saved: Saved) -> None:
    assert saved.load() is None


def test_safetensors_reads_the_files(saved: Saved) -> None:
    saved.train()
    saved.save(1)
    with safe_open(only_file(saved, 1), "pt") as file:
        assert torch.equal(file.get_tensor("model.0.weight"), saved.weights[0].weight)
        assert "optimizer.1.weight.exp_avg_sq" in file.keys()  # noqa: SIM118


def test_a_checkpoint_without_manifest_is_none_and_is_cleared_away(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.save(1)
    saved.begin(2)
    saved.store._pending.written.result()
    assert saved_steps(saved.target) == [1]
    assert only_file(saved, 2).exists()
    successor = Saved(saved.target, attempt=2)
    assert successor.load().step == 1
    assert not folder(saved, 2).exists()
    assert "step-00000002 was never finished" in capsys.readouterr().err


def places(saved: Saved, kind: str) -> list[int]:
    """Bytes of a rank's file that belong to the header, to weights, moments or routers."""
    if kind == "header":
        return [0, 9, 40]
    content = only_file(saved, 2).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:begin])
    return [
        begin + entry["data_offsets"][0] for name, entry in entries.items() if name.startswith(kind)
    ]


@pytest.mark.parametrize("kind", ["header", "model.", "optimizer.", "routers."])
def test_a_flipped_byte_of_any_kind_is_named_and_the_one_before_is_used(
    saved: Saved, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.train()
    saved.save(1)
    expected = saved.values()
    saved.train()
    saved.save(2)
    flipped = places(saved, kind)
    assert flipped
    whole = only_file(saved, 2).read_bytes()
    for place in flipped:
        only_file(saved, 2).write_bytes(whole)
        flip(only_file(saved, 2), place)
        with pytest.raises(DamageError, match=rf"{only_file(saved, 2).name} has another sha256"):
            check_alone(checkpoint_in(saved.target, 2))
    assert saved.load().step == 1
    assert equal(saved.values(), expected)
    told = capsys.readouterr().err
    assert told.count("warning: the checkpoint of step 2 is damaged") == 1
    assert saved_steps(saved.target) == [1]


def test_a_flipped_byte_of_the_index_is_found(saved: Saved) -> None:
    saved.save(1)
    (index,) = folder(saved, 1).glob("*.npz")
    manifest, whole = Manifest.read(checkpoint_in(saved.target, 1)), index.read_bytes()
    for place in range(0, len(whole), 50):
        flip(index, place)
        for check in (check_files, read_index):
            with pytest.raises(DamageError, match=f"{index.name} has another sha256"):
                check(checkpoint_in(saved.target, 1), manifest)
        index.write_bytes(whole)
    assert read_index(checkpoint_in(saved.target, 1), manifest) == whole


def test_the_manifest_does_not_grow_with_the_tensors(saved: Saved) -> None:
    sizes = []
    for layers in (1, 100):
        saved.weights = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))
        saved.optimizer = build_optimizer(saved.weights, OptimConfig())
        saved.store = CheckpointStore(saved.target, Retention(2), 1, lambda: None)
        saved.save(layers)
        sizes.append((folder(saved, layers) / MANIFEST).stat().st_size)
    assert max(sizes) - min(sizes) < 20


def test_every_flipped_byte_of_the_manifest_is_found(saved: Saved) -> None:
    saved.save(1)
    manifest = folder(saved, 1) / MANIFEST
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        flip(manifest, place)
        with pytest.raises(DamageError, match=MANIFEST):
            Manifest.read(checkpoint_in(saved.target, 1))
        manifest.write_bytes(whole)
    Manifest.read(checkpoint_in(saved.target, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), r"has 100 bytes, expected \d+"),
    ],
)
def test_a_missing_or_shortened_file_is_named(
    saved: Saved, damage: Callable[[Path], Any], message: str
) -> None:
    saved.save(1)
    file = only_file(saved, 1)
    damage(file)
    before = saved.values()
    with pytest.raises(UserError, match=rf"every checkpoint .*{file.name} {message}"):
        saved.load()
    assert equal(saved.values(), before)


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(saved: Saved) -> None:
    saved.save(1)
    other = Saved(saved.target)
    other.weights = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
    before = [weight.detach().clone() for weight in other.weights.parameters()]
    with pytest.raises(UserError, match="another model") as refusal:
        other.load()
    assert "model.0.weight is [8, 6] there, [9, 6] here" in str(refusal.value)
    assert "model.1.bias is not in it" in str(refusal.value)
    assert equal([*other.weights.parameters()], before)


def test_retention_keeps_the_newest_those_of_round_steps_and_the_best(tmp_path: Path) -> None:
    saved = Saved(Target(str(tmp_path)), Retention(newest=2, every=4, best=1))
    for step, loss in enumerate([9, 8, 2, 7, 6, 5, 4, 3, 3.5, 3.2], start=1):
        saved.save(step, loss)
    assert saved_steps(saved.target) == [3, 4, 8, 9, 10]
    # The best is known again to the attempt after.
    successor = Saved(saved.target, Retention(newest=2, every=4, best=1), attempt=2)
    successor.load()
    successor.save(11, 3.0)
    assert saved_steps(saved.target) == [3, 4, 8, 10, 11]


@given(st.dictionaries(st.integers(1, 50), st.floats(0, 9) | st.none(), min_size=1), st.data())
def test_retention_always_keeps_the_newest(losses: dict[int, float | None], data: Any) -> None:
    retention = Retention(data.draw(st.integers(1, 4)), None, data.draw(st.integers(0, 3)))
    stays = retention.stays(losses)
    assert max(losses) in stays
    assert stays <= losses.keys()
    assert len(stays) <= retention.newest + retention.best


def test_going_back_sets_newer_checkpoints_aside(saved: Saved) -> None:
    for step in (1, 2, 3):
        saved.train()
        saved.save(step)
    assert saved.load(up_to=2).step == 2
    assert saved_steps(saved.target) == [2]
    saved.save(3)
    assert saved_steps(saved.target) == [2, 3]


def folders(saved: Saved) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in Path(str(saved.target)).iterdir()}


def test_only_what_the_newest_rollback_has_set_aside_stays(tmp_path: Path) -> None:
    saved = Saved(Target(str(tmp_path)), Retention(9))
    for step in (1, 2, 3, 4, 5):
        saved.save(step)
    saved.load(up_to=3)
    # Another attempt that goes back nowhere leaves them.
    successor = Saved(saved.target, Retention(9), attempt=2)
    successor.load()
    assert folders(saved) == {1, 2, 3, 4, 5}
    successor.load(up_to=2)
    assert folders(saved) == {1, 2, 3}
    assert saved_steps(saved.target) == [1, 2]


def test_what_is_set_aside_goes_once_as_many_later_ones_are_saved_as_stay(saved: Saved) -> None:
    for step in (1, 2, 3):
        saved.save(step)
    saved.load(up_to=2)
    saved.save(4)
    assert folders(saved) == {2, 3, 4}
    successor = Saved(saved.target, attempt=2)
    successor.load()
    successor.save(5)
    assert folders(saved) == {4, 5}


def test_what_is_set_aside_goes_once_its_step_is_saved_again(saved: Saved) -> None:
    saved.save(1)
    saved.save(2)
    flip(only_file(saved, 2), -1)
    successor = Saved(saved.target, attempt=2)
    assert successor.load().step == 1
    assert len(list(folder(saved, 2).iterdir())) == 3
    successor.save(2)
    names = {path.name for path in folder(saved, 2).iterdir()}
    assert names == {MANIFEST, *check_alone(checkpoint_in(saved.target, 2)).files}
    assert all("attempt-0001" not in name for name in names)


def test_what_was_set_aside_and_cannot_be_removed_does_not_stop_a_run(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        saved.save(step)
    saved.load(up_to=1)
    saved.save(3)

    def fail(self: Target) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Target, "remove", fail)
        assert saved.load(up_to=1).step == 1
    assert "warning: old checkpoint not removed: Device or resource busy" in capsys.readouterr().err
    assert folders(saved) == {1, 2, 3}
    saved.save(4)
    saved.save(5)
    assert folders(saved) == {4, 5}


def test_an_attempt_that_another_has_followed_commits_nothing(saved: Saved) -> None:
    saved.save(1)
    saved.begin(2)
    saved.current_attempt = 2
    with pytest.raises(RuntimeError, match="another attempt has begun"):
        saved.store.finish_save()
    assert saved_steps(saved.target) == [1]
    assert not (folder(saved, 2) / MANIFEST).exists()


def test_a_folder_that_has_vanished_does_not_come_back(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(str(saved.target)).rmdir()
    assert not saved.save(1)
    assert "No such file or directory" in capsys.readouterr().err
    assert not Path(str(saved.target)).exists()


@contextmanager
def small_disk() -> Iterator[None]:
    """Lets no file grow beyond 100 bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_training_may_go_on(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.save(1)
    with small_disk():
        assert not saved.save(2)
    assert re.search("step 2 could not be written: File too large.*rank 0", capsys.readouterr().err)
    assert not folder(saved, 2).exists()
    assert saved.save(3)
    assert saved_steps(saved.target) == [1, 3]


def test_a_full_disk_ends_training_at_last(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk():
        saved.begin(1)
        saved.store._pending.written.exception()
        with pytest.raises(TrainingError, match="step 1 could not be written: File too large"):
            saved.store.finish_save(is_last=True)
        again = Saved(saved.target)
        again.save(2)
        again.save(3)
        with pytest.raises(TrainingError, match="step 4"):
            again.save(4)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_cost_the_new_one(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.save(1)
    saved.save(2)

    def fail(self: Target) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Target, "remove", fail)
        assert saved.save(3)
    assert "warning: old checkpoint not removed: Device or resource busy" in capsys.readouterr().err
    assert saved_steps(saved.target) == [1, 2, 3]
    assert saved.save(4)
    assert saved_steps(saved.target) == [3, 4]


def test_an_error_after_the_manifest_has_arrived_leaves_no_half_checkpoint(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.save(1)

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.target.sync_folder", fail)
        assert not saved.save(2)
    assert saved_steps(saved.target) == [1]
    assert not folder(saved, 2).exists()


def test_an_attempt_that_gives_up_leaves_what_another_has_saved(saved: Saved) -> None:
    newer = Saved(saved.target, attempt=2)
    newer.save(1)
    with small_disk():
        assert not saved.save(1)
    assert saved_steps(saved.target) == [1]
    check_alone(checkpoint_in(saved.target, 1))


def test_what_cannot_be_read_is_not_taken_for_damage(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.save(1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    file_system = saved.target._place[0]
    for name in ("info", "cat_file", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(file_system, name, fail)
            with pytest.raises(AttemptError, match="Stale file handle"):
                saved.load()
        assert saved_steps(saved.target) == [1]


def test_a_rollback_beyond_the_oldest_checkpoint_takes_that(saved: Saved) -> None:
    for step in (4, 5, 6):
        saved.save(step)
    assert saved.store.load(lambda index: saved.tensors(), up_to=3) is None
    assert saved.store.load(lambda index: saved.tensors(), up_to=3, or_oldest=True).step == 5


def test_a_disk_that_is_full_at_the_manifest_leaves_no_checkpoint(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Target, content: bytes, check: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Target, "commit", fail)
    assert not saved.save(1)
    assert not folder(saved, 1).exists()
