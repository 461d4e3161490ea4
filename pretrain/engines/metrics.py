"""What an engine tells of a step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured, equal on all ranks.

    Attributes:
        loss: mean cross-entropy in nats.
        loss_tokens: that the loss is the mean over.
        grad_norm: before clipping.
    """

    loss: float
    loss_tokens: int
    grad_norm: float
