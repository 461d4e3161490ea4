"""What a replay does, known before any rank is started: where it begins and what it repeats."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from pretrain.checkpoint.manifest import DamageError, Manifest
from pretrain.checkpoint.store import checkpoint_in, saved_steps
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.config import Config, phases_of
from pretrain.curriculum import Phase, phase_at
from pretrain.engines.choice import check_is_native
from pretrain.errors import UserError
from pretrain.ledger import (
    AttemptBegun,
    Delivered,
    Record,
    RolledBack,
    Skipped,
    Trained,
    read_ledger,
)
from pretrain.lineage import skipped_ranges
from pretrain.recorder import PASSED_OVER
from pretrain.run_dir import RunDirectory

# More than a few checkpoints' worth of steps, and not yet days.
MAX_STEPS_AGAIN = 1000
# Settings and sections that change no number of a step.
WITHOUT_INFLUENCE = (
    "checkpoint.",
    "wandb.",
    "run.",
    "train.log_every",
    "train.collective_timeout_s",
    "train.hang_timeout_s",
)
NAMED_AT_MOST = 8


@dataclass(frozen=True)
class ReplayPlan:
    """
    Attributes:
        target: the batch to train again, as the ledger has it.
        phase: of the run, that it belongs to.
        before: the batches that had gone into the weights until then.
        skipped: [first, stop) of the stream's tokens that had been skipped until then.
        checkpoints: where they lie.
        kept: the steps of those that there are.
        checkpoint: the newest step that can be gone on from; 0 is the beginning.
        saved_by: the attempt that saved it, 0 for the beginning.
        of_attempt: what is known of the target's attempt: its number of ranks, its numerics.
        others: what the other attempts that trained some of `before`, or saved the checkpoint, had
            otherwise than the target's; empty if nothing.
        warnings: what was found on the way.
    """

    target: Trained | Skipped
    phase: Phase
    before: list[Trained]
    skipped: list[tuple[int, int]]
    checkpoints: str
    kept: list[int]
    checkpoint: int
    saved_by: int
    of_attempt: dict[str, Any]
    others: dict[int, str]
    warnings: list[str]

    def check(self, checkpoint: int, max_steps_again: int) -> None:
        """Make sure that the target may be reached from `checkpoint`.

        Raises:
            UserError: it is too far away, or not to be reached with the batches of its attempt.
        """
        again = self.target.step - checkpoint
        if again > max_steps_again:
            raise UserError(
                f"step {self.target.step} can be replayed from {_place(checkpoint)} only: "
                f"{again:,} steps to train again, and {max_steps_again:,} are allowed. "
                f"{''.join(f'({warning}) ' for warning in self.warnings)}"
                f"Checkpoints in {self.checkpoints}: {_listed(self.kept)}; a run keeps more of "
                f"them with checkpoint.keep_every=N. To train the steps again all the same: "
                f"--max-steps-again {again}"
            )
        for batch in reversed(self._repeated(checkpoint)):
            if batch.tokens != self.target.tokens:
                raise UserError(
                    f"step {self.target.step} can be replayed from {_place(checkpoint)} only, but "
                    f"attempt {batch.attempt} trained step {batch.step} with {batch.tokens:,} "
                    f"tokens where attempt {self.target.attempt} takes {self.target.tokens:,} "
                    "(train.global_batch x data.seq_len): the batches would be others. It takes a "
                    f"checkpoint of step {batch.step} or later"
                )
        if checkpoint < self.phase.first:
            raise UserError(
                f"step {self.target.step} is one of {self.phase}, and can be replayed from "
                f"{_place(checkpoint)} only, which is before that: it takes a checkpoint of step "
                f"{self.phase.first} or later"
            )

    def describe(self, checkpoint: int) -> str:
        again = self.target.step - checkpoint
        steps = "1 step" if again == 1 else f"{again:,} steps"
        return f"training {steps} again, from {_place(checkpoint)}"

    def caveats(self, checkpoint: int, numerics: dict[str, str]) -> list[str]:
        """Why the numbers need not be bitwise those of the ledger.

        Args:
            numerics: what the replay computes with.
        """
        found = []
        number = self.target.attempt
        for what, now in numerics.items():
            then = self.of_attempt.get(what)
            if then is not None and then != now:
                found.append(f"attempt {number} computed with another {what}: {then}; now {now}")
        if unknown := [what for what in numerics if what not in self.of_attempt]:
            found.append(
                f"attempt {number} has not recorded its {', '.join(unknown)}; now: "
                + ", ".join(numerics[what] for what in unknown)
            )
        repeated = self._repeated(checkpoint)
        for other in sorted({batch.attempt for batch in repeated} - {number}):
            steps = [batch.step for batch in repeated if batch.attempt == other]
            if self.others[other]:
                found.append(
                    f"steps {min(steps)} to {max(steps)} were trained by attempt {other}, with "
                    f"other settings than those that train them again: {self.others[other]}"
                )
        if checkpoint == self.checkpoint and self.saved_by > number and self.others[self.saved_by]:
            found.append(
                f"{_place(checkpoint)} is of attempt {self.saved_by}, which came later and had "
                f"other settings: {self.others[self.saved_by]}"
            )
        return found

    def _repeated(self, checkpoint: int) -> list[Trained]:
        return [batch for batch in self.before if batch.step > checkpoint]


def tries(records: Iterable[Record], step: int) -> list[Trained | Skipped]:
    """Each time that a batch was computed as step `step`, in order."""
    return [batch for batch in computed(records) if batch.step == step]


def computed(records: Iterable[Record]) -> Iterator[Trained | Skipped]:
    """The batches that were not passed over."""
    for record in records:
        is_passed_over = isinstance(record, Skipped) and record.reason == PASSED_OVER
        if isinstance(record, Trained | Skipped) and not is_passed_over:
            yield record


def read_outcomes(run: RunDirectory) -> Iterator[Record]:
    """The ledger's records without the documents of the batches, which may be many."""
    for record in read_ledger(run.ledger):
        yield replace(record, packed=b"") if isinstance(record, Delivered) else record


def ranks_of(run: RunDirectory, attempt: int) -> dict[str, Any]:
    """What an attempt has recorded of its ranks. Raises UserError."""
    path = run.ranks_of(attempt)
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which says how many ranks attempt {attempt} had: bring it back "
            "from a copy of the run directory, or replay a step of another attempt"
        )
    recorded: dict[str, Any] = json.loads(path.read_text())
    return recorded


def plan_replay(config: Config, run: RunDirectory, attempt: int, first_token: int) -> ReplayPlan:
    """Plan to train a batch again.

    Args:
        attempt: the one that tried it; `config` is that attempt's.
        first_token: how many tokens the stream had delivered before it.

    Raises:
        UserError: there is no such batch, too little is known of the attempt, or it trained under
            another engine than the native one.
    """
    check_is_native(config, "a replay")
    records = list(read_outcomes(run))
    found = [
        batch
        for batch in computed(records)
        if (batch.attempt, batch.first_token) == (attempt, first_token)
    ]
    if not found:
        raise UserError(
            f"{run.ledger} has no batch of attempt {attempt} that begins at token {first_token}; "
            "`farspan replay RUN --step N` lists those of a step"
        )
    target = found[-1]
    place = next(i for i, record in enumerate(records) if record is target)
    # An attempt that was fenced off knows nothing of newer ones.
    past = [record for record in records[:place] if record.attempt <= attempt]
    newer = [record for record in records[:place] if record.attempt > attempt]
    later = skipped_ranges([*newer, *records[place:]])
    before = _that_count(past)
    limit = min([first_token, *(first for first, _ in later)])
    checkpoints = checkpoints_of(config, run)
    kept, warnings = saved_steps(checkpoints), []
    checkpoint = saved_by = 0
    for step in (step for step in reversed(kept) if step < target.step):
        try:
            manifest = Manifest.read(checkpoint_in(checkpoints, step))
            if _tokens(manifest) <= limit:
                checkpoint, saved_by = step, manifest.attempt
                break
        except DamageError as error:
            warnings.append(f"the checkpoint of step {step} is damaged: {error}")
    return ReplayPlan(
        target,
        phase_at(phases_of(config), target.step - 1),
        before,
        skipped_ranges(past),
        str(checkpoints),
        kept,
        checkpoint,
        saved_by,
        ranks_of(run, attempt),
        _others(run, attempt, {saved_by, *(batch.attempt for batch in before)} - {0, attempt}),
        warnings,
    )


def _that_count(records: Iterable[Record]) -> list[Trained]:
    """The batches in the weights after `records`."""
    batches: list[Trained] = []
    attempt = 0
    for record in records:
        if isinstance(record, AttemptBegun):
            attempt = record.attempt
        elif record.attempt != attempt:
            # Written after it was fenced off.
            continue
        if isinstance(record, AttemptBegun | RolledBack):
            while batches and batches[-1].first_token >= record.first_token:
                batches.pop()
        elif isinstance(record, Trained):
            batches.append(record)
    return batches


def _tokens(manifest: Manifest) -> int:
    """How many tokens the stream had delivered."""
    stream = manifest.progress["stream"]
    # Within lanes, the cursors are those of where they begin.
    within_lanes = stream["lanes"]["delivered"] if "lanes" in stream else []
    return sum(within_lanes) + sum(cursor["tokens"] for cursor in stream["cursors"])


def _others(run: RunDirectory, attempt: int, others: set[int]) -> dict[int, str]:
    ours = _settings(run, attempt)
    return {other: _differences(_settings(run, other), ours) for other in others}


def _settings(run: RunDirectory, attempt: int) -> dict[str, Any] | None:
    """The settings and the layout of an attempt; None if they are not there any more."""
    config, ranks = run.config_of(attempt), run.ranks_of(attempt)
    if not (config.is_file() and ranks.is_file()):
        return None
    settings = dict(_leaves(yaml.safe_load(config.read_text()), ""))
    kept = {name: v for name, v in settings.items() if not name.startswith(WITHOUT_INFLUENCE)}
    return kept | json.loads(ranks.read_text())


def _differences(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    if theirs is None or ours is None:
        return "unknown ones, their files are missing"
    names = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    named = [f"{name} {theirs.get(name)} (now {ours.get(name)})" for name in sorted(names)]
    more = f" and {len(named) - NAMED_AT_MOST} more" if len(named) > NAMED_AT_MOST else ""
    return ", ".join(named[:NAMED_AT_MOST]) + more


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _place(checkpoint: int) -> str:
    return f"the checkpoint of step {checkpoint}" if checkpoint else "the beginning of the run"


def _listed(steps: list[int]) -> str:
    if not steps:
        return "none"
    if len(steps) <= NAMED_AT_MOST:
        return f"of step {', '.join(map(str, steps))}"
    return f"{len(steps)}, of step {steps[0]} to {steps[-1]}"
