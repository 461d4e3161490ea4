"""How the tokens of a step were spread over the experts."""

from typing import Any

import torch
from torch import Tensor


def summarise_load(expert_counts: Tensor, dropped: Tensor) -> dict[str, Any]:
    """The moe/* metrics of a step, nothing for a dense model.

    Args:
        expert_counts: [layers, E], token-slots that chose each expert over the global batch.
        dropped: [layers], those of them over their expert's capacity.
    """
    if not expert_counts.numel():
        return {}
    load = expert_counts / expert_counts.sum(-1, keepdim=True)
    return {
        "moe/load": load.tolist(),
        "moe/max_violation": float(load.max() * load.shape[1] - 1),
        "moe/dead_experts": int((expert_counts == 0).sum()),
        "moe/dropped": float(dropped.sum() / expert_counts.sum()),
    }


class DeadExperts:
    """Looks for experts that no token has chosen in a window of steps.

    One step without tokens is nothing unusual with many experts; a whole window means that the
    expert gets no gradient and will hardly come back.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._counts: Tensor | None = None
        self._steps = 0

    def add(self, expert_counts: Tensor) -> list[tuple[int, int]] | None:
        """Add a step's counts [layers, E].

        Returns:
            (layer, expert) of the dead once a window is full, and it begins anew; else None.
        """
        counts = expert_counts if self._counts is None else self._counts + expert_counts
        self._counts, self._steps = counts, self._steps + 1
        if self._steps < self._window:
            return None
        self._counts, self._steps = None, 0
        return [(layer, expert) for layer, expert in torch.nonzero(counts == 0).tolist()]
