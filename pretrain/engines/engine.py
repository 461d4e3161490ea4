"""What trains: the loop, the guard and the checkpoints know no more of it than this."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.stream import Batch
from parallel.agreement import Copy
from parallel.gradients import Norms
from pretrain.balancing import RouterState
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.region import Region
from pretrain.layouts import Layout
from pretrain.token_losses import LossPart


@dataclass(frozen=True)
class Measured:
    """What a global batch measured, equal on all ranks.

    What an engine does not measure is None, and is not logged.

    Attributes:
        loss: mean cross-entropy in nats.
        loss_tokens: that the loss is the mean over.
        by_source: the loss of each source of the mixture.
        by_position: the loss by how many tokens one was predicted from, see `LossGroups`.
        expert_counts: [layers, E], slots of each expert; [0, 0] without experts.
        dropped: [layers], slots over capacity.
        numbers: the sums over all ranks of what `Engine.backward` was given.
        aux_loss: balance loss, the mean over layers; 1 where all experts get the same.
        z_loss: the router's z-loss, the mean over tokens and layers.
        router_entropy: of the experts' probabilities in nats, the mean over tokens and layers.
        exposed_communication_s: seconds that collectives kept ranks from computing, the mean.
        pipeline_bubble: share of the forward and backward passes in which ranks computed no stage,
            the mean over them; None without a pipeline.
        pipeline_bubble_predicted: the same as the schedule has it.
    """

    loss: float
    loss_tokens: int
    by_source: Sequence[LossPart]
    by_position: Sequence[LossPart]
    expert_counts: Tensor
    dropped: Tensor
    numbers: Sequence[float] = ()
    aux_loss: float | None = None
    z_loss: float | None = None
    router_entropy: float | None = None
    exposed_communication_s: float | None = None
    pipeline_bubble: float | None = None
    pipeline_bubble_predicted: float | None = None


@dataclass(frozen=True)
class GradientNorms:
    """Of the whole gradient and of the parts of the model before clipping, equal on all ranks.

    Attributes:
        parts: as `parallel.gradients.Norms`; empty where an engine does not take them.
    """

    whole: float
    parts: Sequence[float] = ()


class Engine(Protocol):
    """A model, its optimizer and its routers' state on the ranks of a job.

    A step is `backward`, `clip`, and then `update` or `discard`. All ranks call all methods, in one
    order. It is made with weights that mean nothing: `initialize`, or what `tensors_to_fill` gave
    being filled and `take_over`, comes first.

    Attributes:
        data_rank: this rank's place among the `data_ranks` that take different rows of a global
            batch.
        routers: their state, equal on all ranks.
        updates_in_clip: whether the weights are updated before the norm of the gradient is known:
            who objects to a gradient then can only go back to a checkpoint.
    """

    layout: Layout
    device: torch.device
    data_rank: int
    data_ranks: int
    updates_in_clip: bool
    routers: RouterState

    def initialize(self) -> None:
        """Stand before the first step, with weights that follow from train.seed and their names."""

    def backward(self, batch: Batch, lr: float, numbers: Sequence[float] = ()) -> Measured:
        """Leave the gradient of a global batch, in place of what there was.

        Args:
            batch: the rows of this data rank.
            lr: of the update to come.
            numbers: to be summed over all ranks, exactly as float64 does, with what is summed
                anyway.
        """

    def clip(self) -> GradientNorms:
        """Scale the gradient down to a norm of `optim.clip`."""

    def update(self, measured: Measured) -> None:
        """Step the optimizer, let the routers learn, and forget the gradient."""

    def discard(self) -> None:
        """Forget the gradient."""

    def begin_rows_anew(self) -> None:
        """Batches were passed over: let no row go on with what one before it has left."""

    def tensors(self) -> Mapping[str, Tensor | Region]:
        """All that a run needs to go on: what this rank has of it, by names that depend on neither
        layout nor engine.

        They are `model.NAME` with the name that `Transformer` has for a weight, in float32;
        `optimizer.NAME.` with `exp_avg`, `exp_avg_sq` and `step`, a scalar; `routers.frequencies`
        and `routers.selection_bias`, as `RouterState`; and what an engine has beyond that.
        """

    def tensors_to_fill(self, index: Index) -> Mapping[str, Tensor | Region]:
        """Room for the same, of a checkpoint that any engine has written; where that has nothing of
        an optimizer, as before the first step.
        """

    def take_over(self) -> None:
        """Go on with what `tensors_to_fill` gave, now that it is filled."""

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """What this rank stores of the weights."""

    def copies(self) -> Iterable[Copy]:
        """Weights that must be equal on several ranks, for `check_copies`."""

    def sent_bytes(self) -> Counter[tuple[str, str]] | None:
        """Bytes that this rank has sent, by axis and kind of collective; None: not counted."""

    def weight_and_update_norms(self, lr: float) -> Norms | None:
        """Of all weights, and of the step that has led to them with `lr`: [2] and [2, L + 2]; None:
        not taken.
        """

    def close(self) -> None:
        """Give up what would be in the way of another engine in this process."""
