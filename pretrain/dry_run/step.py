"""A training step that asks for no data, with any number of microbatches."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from parallel.apply import Parallelised
from parallel.fsdp import local_tensor
from parallel.gradients import clip_gradients
from parallel.mesh import Mesh
from parallel.pipeline.plan import peak_stored, problem_of_schedule
from parallel.pipeline.schedule import Pipeline
from parallel.segments.lanes import LaneMemory
from pretrain.config import Config
from pretrain.dry_run.tracker import (
    BACKWARD,
    COMMUNICATION,
    EMBEDDING,
    GATHERED,
    GRADIENTS,
    LANES,
    LOSS,
    OPTIMIZER,
    OTHER,
    UPDATE,
    StepTracker,
    part_of_layer,
)
from pretrain.layouts import Layout, stages_per_rank
from pretrain.model.kernels.documents import Documents
from pretrain.optim import build_optimizer, update_in_backward
from pretrain.parts import pipeline_shape
from pretrain.share import share_of_rank

CPU = torch.device("cpu")


class Step:
    """What a rank does in a step, on a model whose weights do not matter.

    Attributes:
        microbatches: of this rank in a step of the configuration.
        segments: of a row of the configuration.
        lanes: what rows hand on to those of the next step; None where they begin anew.
        activations: stage -> bytes that a forward pass leaves for its backward pass.
        kept: layer -> bytes that its forward pass leaves for its backward pass.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        mesh: Mesh,
        parallelised: Parallelised,
        tracker: StepTracker,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.config = config
        self.layout = layout
        self.mesh = mesh
        self.parallelised = parallelised
        self.tracker = tracker
        self.microbatches = config.train.global_batch // (
            layout.data_ranks * config.train.microbatch
        )
        self.segments = config.context.segments
        self.segment_tokens = config.data.seq_len // self.segments
        rows = self.microbatches * config.train.microbatch
        self.lanes = LaneMemory(rows) if config.context.lane_rows > 1 else None
        self.activations: dict[int, int] = {}
        for stage in parallelised.stages:
            stage.register_forward_pre_hook(self._before_forward)
            stage.register_forward_hook(self._after_forward)
            for number, layer in stage.model.layers.items():
                layer.register_forward_pre_hook(partial(self._before_layer, number))
                layer.register_forward_hook(partial(self._after_layer, number))
        self.kept: dict[str, int] = {}
        for weight in parallelised.weights.parameters():
            weight.register_post_accumulate_grad_hook(self._has_gradient)
        self.optimizer = build_optimizer(parallelised.weights, config.optim)
        self.updates = None
        if config.optim.in_backward:
            self.updates = update_in_backward(parallelised, self.optimizer, device)

    @property
    def bytes_of_tokens(self) -> int:
        """Of a microbatch, with its labels."""
        return 16 * self.config.train.microbatch * self.config.data.seq_len // self.layout.cp

    @property
    def layers(self) -> tuple[int, ...]:
        stages = self.parallelised.stages
        return tuple(int(number) for stage in stages for number in stage.model.layers)

    def warm_up(self) -> None:
        """Make what the first step makes and later ones find: the optimizer's state, what rows go
        on with, and the memory that FSDP gathers weights in, which shows what that is.
        """
        self.tracker.part = GATHERED
        for stage in self.parallelised.stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()
        for weight in self.parallelised.weights.parameters():
            weight.grad = torch.zeros_like(weight)
        self.tracker.part = OPTIMIZER
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.lanes is not None:
            self._fill(self.lanes)

    def _fill(self, lanes: LaneMemory) -> None:
        """Let rows go on with what one segment of a microbatch has left."""
        segments, rows = self.segments, len(lanes.earlier)
        self.take_segments(1)
        self.backward(1)
        self.optimizer.zero_grad()
        self.take_segments(segments)
        for value in lanes.values.values():
            self.tracker.attribute(value, LANES)
        lanes.end([[self.config.data.seq_len]] * rows, [True] * rows)

    def telling_segments(self) -> list[int]:
        """One or three numbers of segments, evenly apart, that tell what the asked number does.

        The first segment is handed nothing and the last hands on nothing. Where gradients flow in
        groups, whole groups are added.
        """
        reach, step, first = self.config.context.reach, 1, 2
        if reach < self.segments:
            step, first = reach, 2 * reach + self.segments % reach
        few = [first, first + step, first + 2 * step]
        return few if sum(few) < self.segments else [self.segments]

    def take_segments(self, segments: int) -> None:
        """Plan with rows of so many segments of the same length."""
        data = self.config.data.model_copy(update={"seq_len": self.segment_tokens * segments})
        context = self.config.context.model_copy(update={"segments": segments})
        self.config = self.config.model_copy(update={"data": data, "context": context})

    def backward(self, microbatches: int) -> None:
        """The forward and backward passes."""
        if self.layout.pp > 1:
            self.parallelised.runner = self._pipeline(microbatches)
        rows, length = microbatches * self.config.train.microbatch, self.config.data.seq_len
        self.tracker.part = OTHER
        shape = (rows, length // self.layout.cp)
        tokens, labels = (
            torch.randint(self.config.model.vocab_size, shape, device=self.device) for _ in range(2)
        )
        size, rank = self.config.train.microbatch, self.mesh.cp.get_local_rank()
        whole = Documents.whole_rows(size, length)
        shares = [
            share_of_rank(self.config, whole, rank, self.lanes, slice(first, first + size))
            for first in range(0, rows, size)
        ]
        documents = [share.documents_on(self.device) for share in shares]
        self.parallelised.forward_backward(tokens, labels, documents, rows * length)

    def update(self) -> None:
        """What comes after them."""
        self.tracker.part = UPDATE
        weights = self.parallelised.weights.named_parameters()
        freed = self.updates.squares if self.updates else None
        n_layers = self.config.model.n_layers
        clip_gradients(weights, self.config.optim.clip, self.layout.pp, n_layers, freed)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.parallelised.replicas.refresh()

    def activations_at_peak(self, microbatches: int) -> int:
        """The most bytes that forward passes leave at a time for their backward passes."""
        if self.layout.pp == 1:
            return sum(self.activations.values())
        order = self._pipeline(microbatches).order()
        return peak_stored(order, self.activations.__getitem__)

    def telling_microbatches(self) -> list[int]:
        """One or two numbers, in order, that tell what any number of microbatches does.

        Above 2 pp a schedule only repeats itself.
        """
        schedule, pp = self.config.parallel.pipeline.schedule, self.layout.pp
        per_rank = stages_per_rank(self.config)
        possible = [
            n
            for n in range(1, self.microbatches + 1)
            if problem_of_schedule(schedule, pp, per_rank, n) is None
        ]
        steady = next((n for n in possible if n >= 2 * pp), possible[-1])
        return sorted({possible[0], steady})

    def _pipeline(self, microbatches: int) -> Pipeline:
        shape = pipeline_shape(self.config, self.layout)
        assert shape is not None
        return Pipeline(
            self.parallelised.stages,
            self.mesh.pp.get_group(),
            replace(shape, n_microbatches=microbatches),
            self.device,
        )

    def _before_forward(self, stage: Any, *_: Any) -> None:
        if self.layout.pp == 1:
            # What earlier microbatches have left.
            self.tracker.attribute_all(BACKWARD, GRADIENTS)
        self.tracker.part = EMBEDDING
        # The first layer frees the buffer that FSDP has gathered the stage's own weights in.
        self.activations[stage.index] = self.tracker.parts[COMMUNICATION]
        self.activations[stage.index] += self.tracker.gathered - self.tracker.live

    def _after_forward(self, stage: Any, *_: Any) -> None:
        self.activations[stage.index] += self.tracker.live - self.tracker.gathered
        # FSDP's buffers are gone: what else was sent or received is kept by layers.
        self.tracker.attribute_all(COMMUNICATION, BACKWARD)
        self.tracker.part = BACKWARD

    def _before_layer(self, number: str, *_: Any) -> None:
        part = self.tracker.part = part_of_layer(number)
        self.kept[number] = -self.tracker.parts[part]

    def _after_layer(self, number: str, *_: Any) -> None:
        self.kept[number] += self.tracker.parts[part_of_layer(number)]
        self.tracker.part = LOSS

    def _has_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.tracker.attribute(local_tensor(weight.grad), GRADIENTS)
