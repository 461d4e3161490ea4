"""The engine of farspan's own layers and parallelism."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream import Batch
from parallel.agreement import Copy, replicated
from parallel.apply import Parallelised
from parallel.expert.deepep import why_unavailable
from parallel.fsdp import local_tensor, owned_region
from parallel.gradients import Norms, clip_gradients
from parallel.mesh import limit_collectives
from parallel.pipeline.schedule import Pipeline
from parallel.segments.lanes import LaneMemory
from parallel.stopwatch import Stopwatch
from pretrain.balancing import RouterState
from pretrain.build import build_mesh, build_model, open_store
from pretrain.checkpoint.contents import OPTIMIZER, of_optimizer, of_routers, of_weights
from pretrain.checkpoint.index import Index
from pretrain.config import Config
from pretrain.engines.engine import GradientNorms, Measured
from pretrain.engines.sums import measured_by, sum_over_ranks
from pretrain.errors import UserError
from pretrain.lane_state import LaneState
from pretrain.layouts import Layout
from pretrain.model.init import initialize
from pretrain.model.kernels.backends import make_deterministic
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.kernels.documents import Documents
from pretrain.objective import build_objective
from pretrain.optim import build_optimizer, set_learning_rate, update_in_backward
from pretrain.share import share_of_rank
from pretrain.token_losses import LossGroups, TokenLosses
from pretrain.update_norms import weight_and_update_norms


class NativeEngine:
    """The model of `config` on the ranks of `layout`, see `Engine`. Collective.

    Attributes:
        parallelised: the stages of this rank.
        weights: a module that holds each weight of this rank once, under its name in the model.
        lanes: what rows hand on to those of the next step; None where they begin anew.
    """

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        if config.train.deterministic:
            make_deterministic()
        self.config, self.layout, self.device = config, layout, device
        self.mesh = build_mesh(config, layout, device)
        limit_collectives(timedelta(seconds=config.train.collective_timeout_s))
        self.data_rank, self.data_ranks = self.mesh.data_rank, self.mesh.data_ranks
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
        self.updates_in_clip = self.updates is not None
        self.routers = RouterState(config.model.n_layers, config.model.moe)
        rows = config.train.global_batch // self.mesh.data_ranks
        self.lanes = LaneMemory(rows) if config.context.lane_rows > 1 else None
        dtype = getattr(torch, config.train.dtype)
        self._lane_state = LaneState(self.lanes, self.mesh, dtype, device)

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

    def initialize(self) -> None:
        config = self.config
        for stage in self.parallelised.stages:
            initialize(stage.model, config.model, config.train.seed, owned_region)
        self.optimizer.state.clear()
        self.routers.reset()
        self._lane_state.take_over()
        self._refresh()

    def tensors(self) -> dict[str, Tensor]:
        return {
            **of_weights(self.weights),
            **of_optimizer(self.weights, self.optimizer),
            **of_routers(self.routers.state_dict()),
            **self._lane_state.tensors(),
        }

    def tensors_to_fill(self, index: Index) -> dict[str, Tensor]:
        if any(name.startswith(OPTIMIZER) for name in index.by_name):
            of_updates = of_optimizer(self.weights, self.optimizer)
        else:
            self.optimizer.state.clear()
            of_updates = {}
        return {
            **of_weights(self.weights),
            **of_updates,
            **of_routers(self.routers.state_dict()),
            **self._lane_state.to_fill(index),
        }

    def take_over(self) -> None:
        self._lane_state.take_over()
        self._refresh()

    def _refresh(self) -> None:
        """Bring what follows the weights and the routers' state up to date."""
        self.parallelised.replicas.refresh()
        for stage in self.parallelised.stages:
            self.routers.copy_to(stage.model.layers)

    def backward(self, batch: Batch, lr: float, numbers: Sequence[float] = ()) -> Measured:
        """As `Engine.backward`; with `optim.in_backward` the updates are done as well."""
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
        set_learning_rate(self.optimizer, lr)
        if self.updates:
            self.updates.begin()
        self._token_losses.begin()
        with self._passes.running(self.device):
            self.parallelised.forward_backward(tokens, labels, documents, count)
            if self.lanes and batch.is_continued is not None:
                lengths = [of_row for part in rows for of_row in part.lengths]
                self.lanes.end(lengths, batch.is_continued.tolist())
            summed = self._add_up(labels, groups, numbers)
        return self._measured(summed, count)

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

    def _add_up(self, labels: Tensor, groups: Tensor, numbers: Sequence[float]) -> list[Tensor]:
        """What the stages of all ranks measured: losses, of the routers, `numbers`, and seconds."""
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
        runner = self.parallelised.runner
        busy_s = runner.busy.take() if isinstance(runner, Pipeline) else 0.0
        seconds = [self.parallelised.take_waited_s(), busy_s]
        more = (routers.new_tensor(x) for x in (numbers, seconds))
        return sum_over_ranks(by_group, routers.flatten(), *more)

    def _measured(self, summed: Sequence[Tensor], loss_tokens: int) -> Measured:
        """
        Args:
            summed: as `_add_up` returned it, after which the time of the passes has ended.
        """
        *of_all, seconds = summed
        found = measured_by(self.config, self._loss_groups, of_all, loss_tokens)
        waited_s, busy_s = (seconds / dist.get_world_size()).tolist()
        passes_s, runner = self._passes.take(), self.parallelised.runner
        found = replace(found, exposed_communication_s=waited_s)
        if not isinstance(runner, Pipeline):
            return found
        bubble, predicted = 1 - busy_s / passes_s, runner.predicted_bubble
        return replace(found, pipeline_bubble=bubble, pipeline_bubble_predicted=predicted)

    def clip(self) -> GradientNorms:
        norms = clip_gradients(
            self.weights.named_parameters(),
            self.config.optim.clip,
            self.layout.pp,
            self.config.model.n_layers,
            self.updates.squares if self.updates else None,
        )
        whole, *parts = torch.cat([norms.whole[None], norms.parts]).tolist()
        return GradientNorms(whole, parts)

    def update(self, measured: Measured) -> None:
        self.optimizer.step()
        self.routers.update(measured.expert_counts)
        self._refresh()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        # What was not learned from is not remembered, so nothing goes on after it.
        self.begin_rows_anew()
        self.optimizer.zero_grad()

    def begin_rows_anew(self) -> None:
        if self.lanes:
            self.lanes.drop()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.weights.named_parameters():
            yield name, local_tensor(weight)

    def copies(self) -> Iterator[Copy]:
        yield from replicated(self.weights.named_parameters())
        yield from self.parallelised.replicas.copies()

    def sent_bytes(self) -> Counter[tuple[str, str]]:
        return self.parallelised.sent_bytes()

    def weight_and_update_norms(self, lr: float) -> Norms:
        n_layers, stages = self.config.model.n_layers, self.layout.pp
        return weight_and_update_norms(self.weights, self.optimizer, lr, n_layers, stages)

    def close(self) -> None:
        """Its groups of ranks go with those of `parallel.mesh`."""
