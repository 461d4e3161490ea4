"""Forward and backward over the microbatches of a step: in a loop, or as a pipeline.

A stage is a module with attributes `index`, `is_first` and `is_last`, called as
`stage(x, labels)`: x is tokens [b, T] on the first stage, else the hidden state; it
returns the hidden state, on the last stage the scalar to differentiate.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from parallel.pipeline.bubble import predicted_bubble
from parallel.pipeline.plan import Action, Schedule, one_stage_order
from parallel.stopwatch import Stopwatch

SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
KINDS = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
# torch 2.11 loses functions with a backward of their own between the halves of a split backward.
SPLITS_BACKWARD = torch.__version__ >= "2.13"


@dataclass(frozen=True)
class PipelineShape:
    """What the ranks of a pipeline have to agree on.

    Attributes:
        n_stages: over all ranks.
        n_microbatches: of a step.
        tokens: [b, T], of a microbatch.
        hidden: [b, T_local, d], what a rank passes on of a microbatch.
        dtype: of the hidden state.
        splits_backward: whether zbv and dualpipev differentiate by inputs first and by weights
            later, where torch can. With activations recomputed this would recompute a layer once
            per weight; without it, input and weight gradients come together and the bubble is
            larger.
    """

    schedule: Schedule
    n_stages: int
    n_microbatches: int
    tokens: tuple[int, int]
    hidden: tuple[int, int, int]
    dtype: torch.dtype
    splits_backward: bool = True


class Pipeline:
    """The stages of one rank among those of a pipeline (torch.distributed.pipelining).

    Weights under FSDP stay gathered from their first use in a step to their last, and their
    gradients are reduced once, at the end.

    Attributes:
        stages: torch's wrappers of this rank's stages.
        sent_bytes: what this rank has passed on to others so far, hidden states and gradients.
        busy: runs while a stage of this rank computes, with what its layers exchange.
        predicted_bubble: of the schedule, see `predicted_bubble`.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        group: dist.ProcessGroup,
        shape: PipelineShape,
        device: torch.device,
    ) -> None:
        for stage in stages:
            if isinstance(stage, FSDPModule):
                # A split backward looks for weights in the graph of the forward: weights
                # gathered anew would not be found, and their gradient silently lost.
                stage.set_reshard_after_forward(False)
        shape = replace(shape, splits_backward=shape.splits_backward and SPLITS_BACKWARD)
        self.shape = shape
        self.rank = dist.get_rank(group)
        self.busy = Stopwatch()
        self.stages = [_torch_stage(stage, group, shape, device, self.busy) for stage in stages]
        self.sent_bytes = 0
        self._bytes_of_step = _passed_on({stage.index for stage in stages}, shape)
        one_stage = shape.schedule in ("gpipe", "1f1b")
        self._schedule: Any = SCHEDULES[shape.schedule](
            self.stages[0] if one_stage else self.stages,
            shape.n_microbatches,
            loss_fn=_output_is_loss,
            scale_grads=False,
        )
        orders = [self.order(rank) for rank in range(dist.get_world_size(group))]
        self.predicted_bubble = predicted_bubble(orders)

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> None:
        """Add the gradient of a step to the weights'. Collective.

        Args:
            tokens, labels: [n_microbatches * b, T], the same on all ranks of a pipeline.
        """
        rows = self.shape.n_microbatches * self.shape.tokens[0]
        assert tokens.shape == (rows, self.shape.tokens[1])
        self._schedule.step(tokens, labels=labels, target=labels, return_outputs=False)
        self.sent_bytes += self._bytes_of_step

    def order(self, rank: int | None = None) -> list[Action]:
        """What a rank of the pipeline, by default this one, computes in a step, in this order."""
        shape, rank = self.shape, self.rank if rank is None else rank
        if shape.schedule in ("gpipe", "1f1b"):
            # What torch says of 1f1b is not what it does.
            ranks = shape.n_stages
            return one_stage_order(shape.schedule, ranks, rank, shape.n_microbatches)
        actions = []
        for action in self._schedule.pipeline_order[rank]:
            for part in () if action is None else (action.sub_actions or (action,)):
                kind: Any = KINDS[part.computation_type.value]
                if not shape.splits_backward:
                    kind = {"input": "backward", "weight": None}.get(kind, kind)
                if kind is not None:
                    actions.append(Action(kind, part.stage_index, part.microbatch_index))
        return actions


def _passed_on(stages: Set[int], shape: PipelineShape) -> int:
    """Bytes that a rank with these stages sends in a step: forward to the stage after each of
    them, and backward to the one before, unless it has that itself.
    """
    sends = sum(
        0 <= other < shape.n_stages and other not in stages
        for stage in stages
        for other in (stage - 1, stage + 1)
    )
    return sends * shape.n_microbatches * prod(shape.hidden) * shape.dtype.itemsize


class SingleStage:
    """The whole model on each rank: microbatches one after the other."""

    def __init__(self, stage: Any, microbatch: int) -> None:
        self.stage = stage
        self.microbatch = microbatch

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> None:
        """Add the gradient of a step to the weights'. Both arguments [rows, T]. Collective."""
        columns = (x.split(self.microbatch) for x in (tokens, labels))
        microbatches = list(zip(*columns, strict=True))
        for number, microbatch in enumerate(microbatches, start=1):
            is_last = number == len(microbatches)
            if isinstance(self.stage, FSDPModule):
                self.stage.set_requires_gradient_sync(is_last)
                self.stage.set_is_last_backward(is_last)
            self.stage(*microbatch).backward()


class _TimedStage(PipelineStage):
    """A stage that tells when it computes."""

    busy: Stopwatch

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """What torch 2.11 connects neighbours with. In a V some are of one rank, and gloo does not
        send from a rank to itself.
        """
        ops = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    def forward_one_chunk(self, *args: Any, **options: Any) -> Any:
        with self.busy.running(self.device):
            return super().forward_one_chunk(*args, **options)

    def backward_one_chunk(self, *args: Any, **options: Any) -> Any:
        with self.busy.running(self.device):
            return super().backward_one_chunk(*args, **options)

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> Any:
        with self.busy.running(self.device):
            return super().backward_weight_one_chunk(*args, **options)


def _torch_stage(
    stage: Any,
    group: dist.ProcessGroup,
    shape: PipelineShape,
    device: torch.device,
    busy: Stopwatch,
) -> PipelineStage:
    # With the shapes of both ends known, torch does not run the stage to find out.
    tokens = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    hidden = torch.empty(shape.hidden, dtype=shape.dtype, device="meta", requires_grad=True)
    loss = torch.empty((), device="meta", requires_grad=True)
    timed = _TimedStage(
        stage,
        stage.index,
        shape.n_stages,
        device,
        input_args=tokens if stage.is_first else hidden,
        output_args=loss if stage.is_last else hidden,
        group=group,
        dw_builder=None if shape.splits_backward else _nothing_left,
    )
    timed.busy = busy
    return timed


def _output_is_loss(output: Tensor, _labels: Tensor) -> Tensor:
    return output


def _nothing_left() -> Any:
    """torch's builder of the backward's second half, when the first did all."""
    return lambda: None
