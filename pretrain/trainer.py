"""One optimizer step after the other: data, an engine, the guard and the checkpoints."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
import torch.distributed as dist

from data_pipeline.stream import Batch, BatchPlan
from parallel.agreement import (
    DisagreementError,
    check_copies,
    check_same,
    evidence_of,
    is_same,
)
from pretrain.checkpoint.owner import claim, refuse_anothers
from pretrain.checkpoint.store import CheckpointStore, Progress, Retention, on_rank_0
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.checkpoint.weights import check_weights
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.build import build_engine
from pretrain.engines.engine import GradientNorms, Measured
from pretrain.errors import AttemptError
from pretrain.guard import Guard, Past, Place, Rollback, Verdict
from pretrain.layouts import resolve_layout
from pretrain.objective import tokens_per_step
from pretrain.run_dir import RunDirectory
from pretrain.schedule import learning_rate


@dataclass(frozen=True)
class Agreed:
    """What the ranks told each other with a step.

    Attributes:
        stop_requested: whether any of them was asked to stop.
        is_written: whether all have written their part of the checkpoint that was begun last.
        data_wait_s: seconds that they waited for the batch, the mean over them.
    """

    stop_requested: bool
    is_written: bool
    data_wait_s: float


@dataclass(frozen=True)
class StepResult:
    """What a step measured, equal on all ranks.

    Attributes:
        norms: of the gradient.
        sent: bytes that this rank sent, by axis and kind of collective; None: not counted.
        seconds: that the step took on this rank, waiting for the batch included.
        passed_over: batches that were skipped again before, and the stream's tokens before each.
        verdict: why the step was not taken; None if it was.
    """

    measured: Measured
    agreed: Agreed
    norms: GradientNorms
    sent: Counter[tuple[str, str]] | None
    seconds: float
    passed_over: list[tuple[BatchPlan, int]]
    verdict: Verdict | None


class Trainer:
    """An engine, its data, and how far they have come.

    It stands at the newest whole checkpoint of `run`, or at the start. Collective.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        device: torch.device,
        attempt: int | None = None,
        past: Past | None = None,
        up_to: int | None = None,
        first_step: int = 0,
    ) -> None:
        """
        Args:
            attempt: of this run, which may change its checkpoints; None leaves them as they are.
            past: what the guard of the run has done before; a rollback that it has not finished is
                finished.
            up_to: the last step whose checkpoint may be loaded.
            first_step: how many steps come before those of `config`: their losses are no measure
                of its own.
        """
        settings = config.model_dump(mode="json") | {"torch": torch.__version__}
        check_same("the configuration", settings)
        self.config = config
        self.device = device
        self.layout = resolve_layout(config, dist.get_world_size())
        self.tokens_per_step = tokens_per_step(config)
        self.stream = open_stream(config)
        self.engine = build_engine(config, self.layout, device)
        saving, target = config.checkpoint, checkpoints_of(config, run)
        check_attempt = partial(run.check_attempt, attempt or 0)
        retention = Retention(saving.keep, saving.keep_every, saving.keep_best)
        self.store = CheckpointStore(target, retention, attempt or 0, check_attempt)
        past = past or Past()
        self.guard = Guard(config.guard, past, can_replay=config.train.engine == "native")
        self._run, self._is_owner = run, attempt is not None
        self._first_step = first_step
        self._beginning = self.stream.state_dict()
        is_shared = self._is_owner and saving.dir is not None
        if is_shared:
            on_rank_0(lambda: refuse_anothers(target, run))
        if past.go_back_to is None:
            self._load(up_to)
        else:
            self._load(past.go_back_to, or_oldest=True)
        if is_shared:
            on_rank_0(lambda: claim(target, run, check_attempt))
        # What fills the newest batch, and how many tokens the stream had delivered before it.
        self.plan, self.first_token = self.stream.next_batch(0), self.stream.tokens
        # Since the checkpoint before.
        self._losses: list[float] = []
        check_copies(self.engine.copies())

    def _load(self, up_to: int | None, *, or_oldest: bool = False) -> None:
        """Stand at the newest checkpoint of at most `up_to` steps, or else at the oldest of all, or
        at the start. Collective.
        """
        to_fill = self.engine.tensors_to_fill
        progress = self.store.load(to_fill, up_to=up_to, or_oldest=or_oldest)
        if progress:
            self.engine.take_over()
        else:
            self._run.refuse_initial_weights(str(self.store.target))
            if self._is_owner:
                self._run.refuse_to_begin_anew(str(self.store.target))
            self.engine.initialize()
        self.progress = progress or Progress(0, 0, self._beginning)
        if self._is_owner:
            self.store.go_on_from(self.progress.step)
        self.stream.load_state_dict(self.progress.stream)
        self._begin_rows_anew_where_attention_changed()
        own_steps = max(0, self.progress.step - self._first_step)
        self.guard.load_state(self.progress.recent[max(0, len(self.progress.recent) - own_steps) :])

    def _begin_rows_anew_where_attention_changed(self) -> None:
        """Keys that `sliding` layers kept for another window are too few or too many, those of
        another base are turned by another angle, and a layer of another kind has kept none.
        """
        model, now = self.config.model_dump(mode="json")["model"], {}
        if "sliding" in self.config.model.layer_kinds():
            now = model["attention"] | {"layer_pattern": model["layer_pattern"]}
        before, self.progress.carried = self.progress.carried, now
        differ = ", ".join(name for name in now if before.get(name) != now[name])
        if differ and "lanes" in self.progress.stream:
            if dist.get_rank() == 0:
                print(
                    f"warning: attention has changed within lanes ({differ}); rows begin anew",
                    flush=True,
                )
            self.engine.begin_rows_anew()

    def step(
        self, stop_requested: bool, beat: Callable[[str], None] = lambda phase: None
    ) -> StepResult:
        """One optimizer step over the next global batch.

        Args:
            stop_requested: whether this rank was asked to stop.
            beat: told which phase begins.
        """
        began, sent = time.perf_counter(), self.engine.sent_bytes()
        beat("data")
        while_waiting = partial(beat, "data")
        passed_over = self.pass_over(while_waiting)
        batch = self.read_batch(while_waiting)
        data_wait_s = time.perf_counter() - began

        beat("forward and backward")
        measured, agreed = self.backward(batch, stop_requested, data_wait_s)
        beat("optimizer")
        norms, verdict = self.finish_step(measured)
        if agreed.is_written:
            self.store.finish_save()
        if sent is not None:
            sent = (self.engine.sent_bytes() or Counter()) - sent
        seconds = time.perf_counter() - began
        return StepResult(measured, agreed, norms, sent, seconds, passed_over, verdict)

    def backward(
        self, batch: Batch, stop_requested: bool = False, data_wait_s: float = 0.0
    ) -> tuple[Measured, Agreed]:
        """Leave the gradient of a global batch in the engine.

        Args:
            batch: this rank's rows of it.
            stop_requested: whether this rank was asked to stop.
            data_wait_s: how long this rank waited for the batch.
        """
        mine = [stop_requested, self.store.is_written, data_wait_s]
        numbers = [*map(float, mine), *evidence_of(self.plan.checksum)]
        measured = self.engine.backward(batch, self.lr(), numbers)
        stops, written, waited_s, *plan = measured.numbers
        self._check_plans(plan)
        ranks = dist.get_world_size()
        return measured, Agreed(stops > 0, written == ranks, waited_s / ranks)

    def _check_plans(self, sums: list[float]) -> None:
        """Make sure that all ranks have planned the same batch, from the sums of `evidence_of` it.

        Raises:
            AttemptError: on every rank; names those that differ from most.
        """
        if is_same(sums, dist.get_world_size()):
            return
        planned = {
            "checksum": self.plan.checksum,
            "tokens before it": self.first_token,
            "state after it": self.stream.state_dict(),
        }
        step = self.progress.step + 1
        try:
            check_same(f"the plan of the global batch of step {step}", planned)
        except DisagreementError as error:
            raise AttemptError(
                f"{error}\nNothing of the step is saved; the same command goes on from the newest "
                "checkpoint. If it comes again, suspect the memory of those ranks' machines"
            ) from None

    def finish_step(self, measured: Measured) -> tuple[GradientNorms, Verdict | None]:
        """Clip, and unless the guard objects, step the optimizer and count the step.

        Returns:
            The norms before clipping, and the verdict; None if the step was taken.
        """
        norms = self.engine.clip()
        verdict = self.guard.judge(measured.loss, norms.whole)
        if verdict and self.engine.updates_in_clip:
            verdict = replace(verdict, kind="roll back")
        if verdict is None:
            self.engine.update(measured)
            self.progress.step += 1
            self.progress.tokens += self.tokens_per_step
            self._losses.append(measured.loss)
        else:
            self.engine.discard()
        self.progress.stream = self.stream.state_dict()
        return norms, verdict

    def skip(self, verdict: Verdict) -> Rollback | None:
        """Skip the newest batch from now on.

        Returns:
            How to go back, if that is not enough.

        Raises:
            TrainingError: it has been done too often.
        """
        step = self.progress.step + 1
        place = Place(self.first_token, self.stream.tokens)
        if verdict.kind == "roll back":
            return self.guard.roll_back(step, place, verdict.reason)
        self.guard.skip(step, place, verdict.reason)
        return None

    def roll_back(self, rollback: Rollback) -> None:
        """Collective."""
        # A checkpoint of an earlier step may still be written.
        self.store.finish_save()
        self._load(rollback.to_step, or_oldest=True)
        self._losses.clear()

    def pass_over(self, beat: Callable[[], None] = lambda: None) -> list[tuple[BatchPlan, int]]:
        """Move on past what has been skipped before: the batches, and the tokens before each."""
        passed_over: list[tuple[BatchPlan, int]] = []
        while self.guard.passes_over(
            Place(first := self.stream.tokens, first + self.tokens_per_step)
        ):
            plan = self.stream.next_batch(self.config.train.global_batch, beat)
            passed_over.append((plan, first))
        if passed_over:
            self.engine.begin_rows_anew()
        return passed_over

    def read_batch(self, beat: Callable[[], None] = lambda: None) -> Batch:
        """This rank's rows of the next global batch."""
        self.first_token = self.stream.tokens
        self.plan = self.stream.next_batch(self.config.train.global_batch, beat)
        share = self.config.train.global_batch // self.engine.data_ranks
        first = self.engine.data_rank * share
        return self.stream.read(self.plan, range(first, first + share), beat)

    def lr(self) -> float:
        """The learning rate of the step to come."""
        return learning_rate(
            self.progress.step, self.config.train.steps, self.config.optim.lr, self.config.schedule
        )

    def save(self, *, is_last: bool = False) -> None:
        """Save in the background, or here and now if the configuration says so or it is the last.

        Collective.

        Raises:
            TrainingError: the last could not be written, or the weights are not worth saving.
        """
        self.store.finish_save()
        if self.store.newest == self.progress.step:
            # Nothing was trained since; what was skipped since is in the ledger.
            self.store.wait_for_removals()
            return
        check_weights(self.engine.named_weights(), self.config.guard.max_weight)
        self.progress.loss = fmean(self._losses) if self._losses else None
        self.progress.recent = self.guard.state()
        self._losses.clear()
        self.store.start_save(self.progress, self.engine.tensors())
        if is_last or not self.config.checkpoint.asynchronous:
            self.store.finish_save(is_last=is_last)
