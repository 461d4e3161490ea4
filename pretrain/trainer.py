"""A model on its ranks, and one optimizer step of it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream import Batch, BatchPlan
from parallel.agreement import (
    Copy,
    DisagreementError,
    check_copies,
    check_same,
    evidence_of,
    is_same,
    replicated,
)
from parallel.apply import Parallelised
from parallel.expert.deepep import why_unavailable
from parallel.fsdp import owned_region
from parallel.gradients import clip_gradients
from parallel.mesh import limit_collectives
from parallel.pipeline.schedule import Pipeline
from parallel.segments.lanes import LaneMemory
from parallel.stopwatch import Stopwatch
from pretrain.balancing import RouterState
from pretrain.build import build_mesh, build_model, open_store
from pretrain.checkpoint.store import CheckpointStore, Progress, Retention
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.checkpoint.weights import check_weights
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.errors import AttemptError, UserError
from pretrain.guard import Guard, Past, Place, Rollback, Verdict
from pretrain.lane_state import LaneState
from pretrain.layouts import resolve_layout
from pretrain.model.init import initialize
from pretrain.model.kernels.backends import make_deterministic
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.kernels.documents import Documents
from pretrain.objective import Measured, build_objective, tokens_per_step
from pretrain.optim import build_optimizer, set_learning_rate, update_in_backward
from pretrain.run_dir import RunDirectory
from pretrain.schedule import learning_rate
from pretrain.share import share_of_rank
from pretrain.token_losses import LossGroups, TokenLosses


@dataclass
class StepResult:
    """What a step measured, equal on all ranks.

    Attributes:
        grad_norm: before clipping.
        grad_norms: of the parts of the model, as `parallel.gradients.Norms`.
        sent: bytes that this rank sent, by axis and kind of collective.
        seconds: that the step took on this rank, waiting for the batch included.
        passed_over: batches that were skipped again before, and the stream's tokens before each.
        verdict: why the step was not taken; None if it was.
    """

    measured: Measured
    grad_norm: float
    grad_norms: list[float]
    sent: Counter[tuple[str, str]]
    seconds: float
    passed_over: list[tuple[BatchPlan, int]]
    verdict: Verdict | None


class Trainer:
    """A model on its ranks, its optimizer, its data, and how far they have come.

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
        if config.train.deterministic:
            make_deterministic()
        settings = config.model_dump(mode="json") | {"torch": torch.__version__}
        check_same("the configuration", settings)
        self.config = config
        self.device = device
        self.layout = resolve_layout(config, dist.get_world_size())
        self.mesh = build_mesh(config, self.layout, device)
        limit_collectives(timedelta(seconds=config.train.collective_timeout_s))
        self.tokens_per_step = tokens_per_step(config)
        self.stream = open_stream(config)
        self._token_losses = TokenLosses(config.train.loss_chunk)
        longest = config.data.seq_len * config.context.lane_rows
        self._loss_groups = LossGroups(len(config.data.sources()), longest)
        self._passes = Stopwatch()
        self.parallelised = self._build_model()
        self.weights = self.parallelised.weights
        self.optimizer = build_optimizer(self.weights, config.optim)
        self.updates = None
        if config.optim.in_backward:
            self.updates = update_in_backward(self.parallelised, self.optimizer, device)
        self.routers = RouterState(config.model.n_layers, config.model.moe)
        rows = config.train.global_batch // self.mesh.data_ranks
        self.lanes = LaneMemory(rows) if config.context.lane_rows > 1 else None
        dtype = getattr(torch, config.train.dtype)
        self._lane_state = LaneState(self.lanes, self.mesh, dtype, device)
        saving = config.checkpoint
        self.store = CheckpointStore(
            checkpoints_of(config, run),
            Retention(saving.keep, saving.keep_every, saving.keep_best),
            attempt or 0,
            partial(run.check_attempt, attempt or 0),
        )
        past = past or Past()
        self.guard = Guard(config.guard, past)
        self._run, self._is_owner = run, attempt is not None
        self._first_step = first_step
        self._beginning = self.stream.state_dict()
        if past.go_back_to is None:
            self._load(up_to)
        else:
            self._load(past.go_back_to, or_oldest=True)
        # What fills the newest batch, and how many tokens the stream had delivered before it.
        self.plan, self.first_token = self.stream.next_batch(0), self.stream.tokens
        # Of the newest step, as `parallel.gradients.Norms.parts`.
        self.grad_norms: list[float] = []
        # Since the checkpoint before.
        self._losses: list[float] = []
        check_copies(self._copies())

    def _copies(self) -> Iterator[Copy]:
        yield from replicated(self.weights.named_parameters())
        yield from self.parallelised.replicas.copies()

    def _build_model(self) -> Parallelised:
        config = self.config
        dtype = getattr(torch, config.train.dtype)
        is_deepep = self.layout.ep > 1 and config.parallel.dispatcher == "deepep"
        if is_deepep and (why := why_unavailable(self.device, dtype)):
            raise UserError(why)
        store = open_store(config)
        objective = build_objective(config, self._token_losses)
        parallelised = build_model(config, self.layout, self.mesh, self.device, objective, store)
        for stage in parallelised.stages:
            stage.to_empty(device=self.device)
        return parallelised

    def _load(self, up_to: int | None, *, or_oldest: bool = False) -> None:
        """Stand at the newest checkpoint of at most `up_to` steps, or else at the oldest of all, or
        at the start. Collective.
        """
        state = self.weights, self.optimizer, self.routers.state_dict()
        more = self._lane_state.to_fill
        progress = self.store.load(*state, more=more, up_to=up_to, or_oldest=or_oldest)
        self._lane_state.take_over()
        if progress is None:
            if self._is_owner:
                self._run.refuse_to_begin_anew(str(self.store.target))
            config, beginning = self.config, Progress(0, 0, self._beginning)
            for stage in self.parallelised.stages:
                initialize(stage.model, config.model, config.train.seed, owned_region)
            self.optimizer.state.clear()
            self.routers.reset()
        self.progress = progress or beginning
        if self._is_owner:
            self.store.go_on_from(self.progress.step)
        self.stream.load_state_dict(self.progress.stream)
        own_steps = max(0, self.progress.step - self._first_step)
        self.guard.load_state(self.progress.recent[max(0, len(self.progress.recent) - own_steps) :])
        self._refresh()

    def step(
        self, stop_requested: bool, beat: Callable[[str], None] = lambda phase: None
    ) -> StepResult:
        """One optimizer step over the next global batch.

        Args:
            stop_requested: whether this rank was asked to stop.
            beat: told which phase begins.
        """
        began, sent = time.perf_counter(), self.parallelised.sent_bytes()
        beat("data")
        while_waiting = partial(beat, "data")
        passed_over = self.pass_over(while_waiting)
        batch = self.read_batch(while_waiting)
        data_wait_s = time.perf_counter() - began

        beat("forward and backward")
        measured = self.backward(batch, stop_requested, data_wait_s)
        beat("optimizer")
        grad_norm, verdict = self.finish_step(measured)
        if measured.is_written:
            self.store.finish_save()
        sent = self.parallelised.sent_bytes() - sent
        seconds = time.perf_counter() - began
        return StepResult(measured, grad_norm, self.grad_norms, sent, seconds, passed_over, verdict)

    def backward(
        self, batch: Batch, stop_requested: bool = False, data_wait_s: float = 0.0
    ) -> Measured:
        """Leave the gradient of a global batch in the weights' `.grad`, or with
        `optim.in_backward` the updates of that.

        Args:
            batch: this rank's rows of it.
            stop_requested: whether this rank was asked to stop.
            data_wait_s: how long this rank waited for the batch.
        """
        position = torch.from_numpy(batch.position)
        rows = [
            Documents.from_position(part) for part in position.split(self.config.train.microbatch)
        ]
        if self.lanes and batch.continues is not None:
            self.lanes.begin(batch.continues.tolist())
        tokens, labels, documents, groups = self._share_of(batch, rows)
        # Ranks of pp and tp work on the same tokens.
        copies = self.layout.pp * self.layout.tp
        loss_tokens = (labels != IGNORED).sum()
        dist.all_reduce(loss_tokens)
        count = max(1, int(loss_tokens) // copies)
        if self.updates:
            set_learning_rate(self.optimizer, self.lr())
            self.updates.begin()
        self._token_losses.begin()
        with self._passes.running(self.device):
            self.parallelised.forward_backward(tokens, labels, documents, count)
            if self.lanes and batch.is_continued is not None:
                lengths = [of_row for part in rows for of_row in part.lengths]
                self.lanes.end(lengths, batch.is_continued.tolist())
            total = self._add_up(labels, groups, stop_requested, data_wait_s)
        return self._measured(total, count)

    def _share_of(
        self, batch: Batch, microbatches: Sequence[Documents]
    ) -> tuple[Tensor, Tensor, list[Any], Tensor]:
        """This rank's part of its rows: tokens and labels [rows, T / cp], documents of each
        microbatch, or of its segments, and the tokens' `LossGroups`. Only that part is sent to the
        device.
        """
        columns = [torch.from_numpy(x) for x in (batch.tokens, batch.labels, batch.source)]
        rank, size = self.mesh.cp.get_local_rank(), self.config.train.microbatch
        shares = [
            share_of_rank(self.config, documents, rank, self.lanes, slice(first, first + size))
            for first, documents in zip(
                range(0, len(batch.tokens), size), microbatches, strict=True
            )
        ]
        if mine := [share.tokens for share in shares if share.tokens is not None]:
            columns = [x.gather(1, torch.cat(mine)) for x in columns]
        tokens, labels, source = columns
        position = torch.cat([share.position for share in shares])
        groups = self._loss_groups.of_tokens(source, position)
        tokens, labels, groups = (
            x.to(self.device, non_blocking=True) for x in (tokens, labels, groups)
        )
        return tokens, labels, [share.documents_on(self.device) for share in shares], groups

    def _add_up(
        self, labels: Tensor, groups: Tensor, stop_requested: bool, data_wait_s: float
    ) -> Sequence[Tensor]:
        """What the stages of all ranks measured, on the host: the sum of the losses, flags and
        seconds, evidence of the plan, losses by group, and of the routers. Collective.
        """
        moe = self.config.model.moe
        layers = self.config.model.n_layers if moe.n_experts else 0
        routers = torch.zeros(layers, 4 + moe.n_experts, dtype=torch.float64, device=self.device)
        by_group = routers.new_zeros(1 + self._loss_groups.size)
        if self._token_losses.seen:
            losses = self.parallelised.as_rows(self._token_losses.seen)
            by_group[0] = losses.double().sum()
            by_group[1:] = self._loss_groups.add_up(losses, labels, groups)
        # The ranks of tp have each seen the loss of all their tokens.
        by_group /= self.mesh.tp.size()
        for stage in self.parallelised.stages:
            routers[[int(number) for number in stage.model.layers][:layers]] += stage.measured
        flags = routers.new_tensor([stop_requested, self.store.is_written])
        runner = self.parallelised.runner
        busy_s = runner.busy.take() if isinstance(runner, Pipeline) else 0.0
        seconds = [data_wait_s, self.parallelised.take_waited_s(), busy_s]
        plan = routers.new_tensor(evidence_of(self.plan.checksum))
        parts = [flags, routers.new_tensor(seconds), plan, by_group, routers.flatten()]
        total = torch.cat(parts)
        dist.all_reduce(total)
        return total.cpu().split([len(part) for part in parts])

    def _measured(self, total: Sequence[Tensor], loss_tokens: int) -> Measured:
        """
        Args:
            total: as `_add_up` returned it, after which the time of the passes has ended.
        """
        flags, seconds, plan, by_group, of_routers = total
        self._check_plans(plan.tolist())
        ranks, layers = dist.get_world_size(), self.config.model.n_layers
        data_wait_s, waited_s, busy_s = (seconds / ranks).tolist()
        by_source, by_position = self._loss_groups.split(by_group[1:])
        routers = of_routers.view(-1, 4 + self.config.model.moe.n_experts)
        balance, z, entropy = routers[:, :3].sum(0).tolist()
        places = max(1, self.tokens_per_step * layers)
        return Measured(
            loss=float(by_group[0]) / loss_tokens,
            aux_loss=balance / places,
            z_loss=z / places,
            router_entropy=entropy / places,
            loss_tokens=loss_tokens,
            by_source=by_source,
            by_position=by_position,
            data_wait_s=data_wait_s,
            exposed_communication_s=waited_s,
            pipeline_bubble=1 - busy_s / self._passes.take(),
            expert_counts=routers[:, 4:],
            dropped=routers[:, 3],
            stop_requested=bool(flags[0] > 0),
            is_written=int(flags[1]) == ranks,
        )

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

    def finish_step(self, measured: Measured) -> tuple[float, Verdict | None]:
        """Clip, and unless the guard objects, step the optimizer and count the step.

        Returns:
            The norm before clipping, and the verdict; None if the step was taken.
        """
        freed = self.updates.squares if self.updates else None
        norms = clip_gradients(
            self.weights.named_parameters(),
            self.config.optim.clip,
            self.layout.pp,
            self.config.model.n_layers,
            freed,
        )
        grad_norm, *self.grad_norms = torch.cat([norms.whole[None], norms.parts]).tolist()
        verdict = self.guard.judge(measured.loss, grad_norm)
        if verdict and self.updates:
            # The weights have been updated already.
            verdict = replace(verdict, kind="roll back")
        if verdict is None:
            set_learning_rate(self.optimizer, self.lr())
            self.optimizer.step()
            self.routers.update(measured.expert_counts)
            self._refresh()
            self.progress.step += 1
            self.progress.tokens += self.tokens_per_step
            self._losses.append(measured.loss)
        elif self.lanes:
            # What was not learned from is not remembered, so nothing goes on after it.
            self.lanes.drop()
        self.optimizer.zero_grad()
        self.progress.stream = self.stream.state_dict()
        return grad_norm, verdict

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

    def _refresh(self) -> None:
        """Bring what follows the weights and the routers' state up to date."""
        self.parallelised.replicas.refresh()
        for stage in self.parallelised.stages:
            self.routers.copy_to(stage.model.layers)

    def pass_over(self, beat: Callable[[], None] = lambda: None) -> list[tuple[BatchPlan, int]]:
        """Move on past what has been skipped before: the batches, and the tokens before each."""
        passed_over: list[tuple[BatchPlan, int]] = []
        while self.guard.passes_over(
            Place(first := self.stream.tokens, first + self.tokens_per_step)
        ):
            plan = self.stream.next_batch(self.config.train.global_batch, beat)
            passed_over.append((plan, first))
        if passed_over and self.lanes:
            self.lanes.drop()
        return passed_over

    def read_batch(self, beat: Callable[[], None] = lambda: None) -> Batch:
        """This rank's rows of the next global batch."""
        self.first_token = self.stream.tokens
        self.plan = self.stream.next_batch(self.config.train.global_batch, beat)
        share = self.config.train.global_batch // self.mesh.data_ranks
        first = self.mesh.data_rank * share
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
        check_weights(self.weights, self.config.guard.max_weight)
        self.progress.loss = fmean(self._losses) if self._losses else None
        self.progress.recent = self.guard.state()
        self._losses.clear()
        state = self.weights, self.optimizer, self.routers.state_dict()
        self.store.start_save(self.progress, *state, self._lane_state.tensors())
        if is_last or not self.config.checkpoint.asynchronous:
            self.store.finish_save(is_last=is_last)
