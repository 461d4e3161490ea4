"""The checkpoints of a run: each complete or absent, never half."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.index import Index
from pretrain.checkpoint.manifest import (
    MANIFEST,
    SET_ASIDE,
    DamageError,
    FileEntry,
    Manifest,
    attempt_prefix,
    check_files,
    read_index,
)
from pretrain.checkpoint.reader import read_tensors, refuse_another_model
from pretrain.checkpoint.region import Region
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.target import Target
from pretrain.errors import AttemptError, TrainingError, UserError

# A full disk may be emptied by a person while training goes on.
FAILURES_IN_A_ROW = 3

T = TypeVar("T")


@dataclass
class Progress:
    """How far a run has come: everything that is not a tensor.

    Attributes:
        step: optimizer steps finished.
        tokens: tokens trained on.
        stream: the data stream's state, a few integers per source.
        loss: mean over the steps since the checkpoint before; None before the first.
        recent: (loss, gradient norm) of the last steps, which the guard compares new ones with.
        carried: settings that decide what rows of lanes have left for the next ones.
    """

    step: int
    tokens: int
    stream: dict[str, Any]
    loss: float | None = None
    recent: Sequence[tuple[float, float]] = ()
    carried: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        newest: how many of the newest.
        every: also those of steps that it divides; None for no others.
        best: also so many of those with the least loss.
    """

    newest: int
    every: int | None = None
    best: int = 0

    def stays(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of those with these losses."""
        steps = sorted(losses)
        every = {step for step in steps if self.every and step % self.every == 0}
        known = [(loss, step) for step, loss in losses.items() if loss is not None]
        best = [step for _, step in sorted(known)[: self.best]]
        return {*steps[-self.newest :], *every, *best}


@dataclass
class _Pending:
    """A checkpoint whose files are being written."""

    progress: Progress
    written: Future[dict[str, FileEntry]]


class CheckpointStore:
    """Saves to and loads from `target`/step-NNNNNNNN, all ranks together.

    Files of a checkpoint are named after the attempt, so that an older one which is still alive
    writes beside those of a newer, never over them.

    Attributes:
        newest: the step of the newest finished checkpoint, or at which the run began.
    """

    def __init__(
        self,
        target: Target,
        retention: Retention,
        attempt: int,
        check_attempt: Callable[[], None],
    ) -> None:
        """
        Args:
            check_attempt: raises if another attempt has begun; called by rank 0 before it changes
                what is saved.
        """
        self.target = target
        self._retention = retention
        self._attempt = attempt
        self._check_attempt = check_attempt
        self._staging: Staging | None = None
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._losses: dict[int, float | None] = {}
        # Steps, on rank 0.
        self._set_aside: set[int] = set()
        self._retained: Future[None] | None = None
        self._failures = 0
        self.newest: int | None = None

    @property
    def is_written(self) -> bool:
        """Whether a checkpoint waits for `finish_save` and this rank has done its part."""
        return self._pending is not None and self._pending.written.done()

    def start_save(
        self,
        progress: Progress,
        tensors: Mapping[str, Tensor | Region],
    ) -> None:
        """Copy what is to be saved, and write it in the background. Collective.

        Args:
            tensors: by name, what this rank has of them; the same ones each time.
        """
        assert self._pending is None, "finish_save comes first"
        if self._staging is None:
            self._staging = Staging(tensors, self._attempt)
        self._staging.copy(tensors)
        progress = Progress(**asdict(progress))
        folder = checkpoint_in(self.target, progress.step)
        self._pending = _Pending(progress, self._writer.submit(self._write, folder))

    def finish_save(self, *, is_last: bool = False) -> bool:
        """Wait for the files of the checkpoint that is being written, and commit it. Collective.

        A checkpoint that could not be written is told and its files removed; training goes on with
        the checkpoints from before.

        Returns:
            Whether one was committed.

        Raises:
            TrainingError: it was the last chance, or too many in a row could not be written.
            FencedError: another attempt has begun.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        step = pending.progress.step
        outcomes = _gather_on_rank_0(_outcome(pending.written))
        problem = on_rank_0(lambda: self._commit(pending.progress, outcomes))
        if problem is None:
            self._failures, self.newest = 0, step
            if dist.get_rank() == 0:
                # Thousands of files are not removed within a step, nor left when the run ends.
                self._retained = self._writer.submit(self._retain)
                if is_last:
                    self.wait_for_removals()
            return True
        self._failures += 1
        self._give_up(step, problem)
        if is_last or self._failures == FAILURES_IN_A_ROW:
            raise TrainingError(
                f"the checkpoint of step {step} could not be written: {problem}. The checkpoints "
                f"before it are whole; the same command goes on from the newest of {self.target}"
            )
        return False

    def load(
        self,
        to_fill: Callable[[Index], Mapping[str, Tensor | Region]],
        *,
        up_to: int | None = None,
        or_oldest: bool = False,
    ) -> Progress | None:
        """Load the newest whole checkpoint in place; None if there is no checkpoint. Collective.

        Args:
            to_fill: what of it this rank wants, which may be laid out over the ranks in another way
                than it was saved in.
            up_to: the last step that is wanted.
            or_oldest: rather than none, take the oldest of those that are newer than that.

        Raises:
            UserError: there are checkpoints, and all of them are damaged or of another model.
        """
        steps = on_rank_0(self._saved_steps)
        wanted = [step for step in steps if up_to is None or step <= up_to]
        wanted = wanted or (steps[:1] if or_oldest else [])
        found = newest_whole(self.target, wanted, check_together)
        if found is None:
            return None
        step, manifest = found
        checkpoint = checkpoint_in(self.target, step)
        index = Index.from_bytes(on_rank_0(lambda: read_index(checkpoint, manifest)))
        into = to_fill(index)
        together(lambda: refuse_another_model(checkpoint, index, into))
        together(lambda: read_tensors(checkpoint, index, into))
        return Progress(**manifest.progress)

    def go_on_from(self, step: int) -> None:
        """Set checkpoints of later steps aside, damaged ones among them, and remove what was never
        finished, and what had been set aside when the run went back before. Collective.
        """
        on_rank_0(lambda: self._clear_away(step))
        self.newest = step

    def wait_for_removals(self) -> None:
        """Of what need not stay since the newest checkpoint was committed."""
        if self._retained is not None:
            self._retained.result()

    def _saved_steps(self) -> list[int]:
        self.wait_for_removals()
        return saved_steps(self.target)

    def _write(self, folder: Target) -> dict[str, FileEntry]:
        assert self._staging is not None
        # A run directory that has vanished must not come back half.
        folder.make(parents=False)
        return self._staging.write(folder)

    def _commit(
        self, progress: Progress, outcomes: Sequence[dict[str, FileEntry] | str]
    ) -> str | None:
        """Returns what has gone wrong."""
        files: dict[str, FileEntry] = {}
        for outcome in outcomes:
            if isinstance(outcome, str):
                return outcome
            files |= outcome
        manifest = Manifest(self._attempt, asdict(progress), files)
        folder = checkpoint_in(self.target, progress.step)
        try:
            (folder / MANIFEST).commit(manifest.to_bytes(), self._check_attempt)
        except (OSError, AttemptError) as error:
            return _describe(error)
        self._losses[progress.step] = progress.loss
        return None

    def _retain(self) -> None:
        """Remove what need not stay; what cannot be removed now is tried again next time."""
        for step in sorted(self._losses.keys() - self._retention.stays(self._losses)):
            if self._has_removed(step):
                del self._losses[step]
        for step in sorted(self._set_aside):
            later = sum(saved > step for saved in self._losses)
            if step in self._losses:
                self._remove_replaced(step)
            elif later >= self._retention.newest and self._has_removed(step):
                self._set_aside.remove(step)

    def _has_removed(self, step: int) -> bool:
        try:
            _remove(checkpoint_in(self.target, step))
        except (OSError, AttemptError) as error:
            _warn_of_leftovers(error)
            return False
        return True

    def _remove_replaced(self, step: int) -> None:
        """What was set aside, from the folder of a step that has been saved again."""
        checkpoint = checkpoint_in(self.target, step)
        try:
            stays = {MANIFEST, *Manifest.read(checkpoint).files}
            for name in sorted({*checkpoint.names()} - stays):
                (checkpoint / name).remove()
        except (OSError, AttemptError, DamageError) as error:
            _warn_of_leftovers(error)
        else:
            self._set_aside.remove(step)

    def _give_up(self, step: int, problem: str) -> None:
        if dist.get_rank() != 0:
            return
        # Of its own files only: another attempt may have saved the same step by now. A manifest of
        # its own may have arrived before the error did, and must not outlive them.
        with suppress(OSError, AttemptError):
            folder = checkpoint_in(self.target, step)
            with suppress(DamageError):
                if Manifest.read(folder).attempt == self._attempt:
                    (folder / MANIFEST).remove()
            for name in folder.names():
                if name.startswith(attempt_prefix(self._attempt)):
                    (folder / name).remove()
            if not folder.names():
                folder.remove()
        # The log may lie on the same full disk.
        with suppress(OSError):
            print(
                f"warning: the checkpoint of step {step} could not be written: {problem}; "
                "the checkpoints before it are whole",
                file=sys.stderr,
                flush=True,
            )

    def _clear_away(self, newest: int) -> None:
        self.target.make()
        saved = self._saved_steps()
        for step in _steps_of_folders(self.target):
            checkpoint = checkpoint_in(self.target, step)
            if (checkpoint / SET_ASIDE).exists():
                self._set_aside.add(step)
            elif step not in saved:
                self._check_attempt()
                print(f"warning: {checkpoint} was never finished: removed", file=sys.stderr)
                _remove(checkpoint)
        if saved and saved[-1] > newest:
            self._check_attempt()
            for step in sorted(self._set_aside.difference(saved)):
                if self._has_removed(step):
                    self._set_aside.remove(step)
        for step in saved:
            checkpoint = checkpoint_in(self.target, step)
            if step > newest:
                self._check_attempt()
                (checkpoint / MANIFEST).rename(SET_ASIDE)
                self._set_aside.add(step)
                self._losses.pop(step, None)
            elif step not in self._losses:
                self._losses[step] = _loss_of(checkpoint) if self._retention.best else None


def checkpoint_in(target: Target, step: int) -> Target:
    return target / f"step-{step:08d}"


def saved_steps(target: Target) -> list[int]:
    """The steps of the finished checkpoints, oldest first."""
    return [
        step
        for step in _steps_of_folders(target)
        if (checkpoint_in(target, step) / MANIFEST).exists()
    ]


def check_alone(checkpoint: Target) -> Manifest:
    """The manifest of a checkpoint that is whole. Raises DamageError."""
    manifest = Manifest.read(checkpoint)
    check_files(checkpoint, manifest)
    return manifest


def newest_whole(
    target: Target, steps: list[int], check: Callable[[Target], Manifest] = check_alone
) -> tuple[int, Manifest] | None:
    """The newest of `steps` whose checkpoint is whole, None if there are none.

    A damaged one is named on stderr and passed over.

    Raises:
        UserError: all are damaged.
    """
    damage = None
    for step in reversed(steps):
        try:
            return step, check(checkpoint_in(target, step))
        except DamageError as error:
            damage = error
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(
                    f"warning: the checkpoint of step {step} is damaged: {damage}", file=sys.stderr
                )
    if damage:
        raise UserError(
            f"every checkpoint in {target} that could be loaded, of step "
            f"{', '.join(map(str, steps))}, is damaged; the oldest: {damage}. Restore one, or "
            "begin anew in another --run-dir"
        )
    return None


def check_together(checkpoint: Target) -> Manifest:
    """`check_alone`; rank 0 reads the manifest, the ranks share the files. Raises on all alike."""
    manifest = on_rank_0(lambda: Manifest.read(checkpoint))
    together(lambda: check_files(checkpoint, manifest, dist.get_rank(), dist.get_world_size()))
    return manifest


def _steps_of_folders(target: Target) -> list[int]:
    matches = (re.fullmatch(r"step-(\d{8,})", name) for name in target.names())
    return sorted(int(match[1]) for match in matches if match)


def _remove(checkpoint: Target) -> None:
    """Without its manifest a checkpoint is none: that goes first."""
    (checkpoint / MANIFEST).remove()
    checkpoint.remove()


def _loss_of(checkpoint: Target) -> float | None:
    try:
        loss: float | None = Manifest.read(checkpoint).progress["loss"]
    except DamageError:
        return None
    return loss


def _outcome(written: Future[dict[str, FileEntry]]) -> dict[str, FileEntry] | str:
    try:
        return written.result()
    except (OSError, AttemptError) as error:
        return f"{_describe(error)} (rank {dist.get_rank()})"


def _warn_of_leftovers(error: OSError | AttemptError | DamageError) -> None:
    what = _describe(error)
    print(f"warning: old checkpoint not removed: {what}", file=sys.stderr, flush=True)


def _describe(error: OSError | AttemptError | DamageError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def on_rank_0(work: Callable[[], T]) -> T:
    """What rank 0 does, told or raised on all ranks. Collective."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def together(work: Callable[[], None]) -> None:
    """What each rank does; fails on all ranks if it fails on one. Collective."""
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    raised_anywhere = [error for error in errors if error is not None]
    # What cannot be read now is no reason to give a checkpoint up, even if another file is damaged.
    for error in sorted(raised_anywhere, key=lambda error: not isinstance(error, AttemptError)):
        raise error


def _gather_on_rank_0(value: T) -> list[T]:
    """Of all ranks; nothing on the others."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None)
    return values
