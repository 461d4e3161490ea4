"""AdamW's state of each weight, wherever megatron-core's optimizers have it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Moments:
    """Of megatron-core's optimizer, which is a chain: dense weights, and experts.

    torch's AdamW counts the steps of each weight, Transformer Engine's and Apex's those of a group.

    Args:
        optimizer: what `get_megatron_optimizer` has returned.
    """

    def __init__(self, optimizer: Any) -> None:
        self._links = [link for link in optimizer.chained_optimizers if link.optimizer is not None]
        self._of_weight: dict[Tensor, tuple[Any, dict[str, Any]]] = {
            weight: (link.optimizer, group)
            for link in self._links
            for group in link.optimizer.param_groups
            for weight in group["params"]
        }

    def begin(self) -> None:
        """Make the state of weights that have taken no step: zeros."""
        for link in self._links:
            link.init_state_fn(link.optimizer, link.config)
            for group in link.optimizer.param_groups:
                if not isinstance(link.optimizer, torch.optim.AdamW):
                    group.setdefault("step", 0)
                    continue
                for weight in group["params"]:
                    link.optimizer.state[weight].setdefault("step", torch.tensor(0.0))

    def forget(self) -> None:
        """Stand before the first step."""
        for link in self._links:
            link.optimizer.state.clear()
            for group in link.optimizer.param_groups:
                group.pop("step", None)

    def moment(self, weight: Tensor, which: str) -> Tensor:
        """One of `MOMENTS`, of a weight as it is stored; `begin` comes first."""
        moment: Tensor = self._of_weight[weight][0].state[weight][which]
        return moment

    def step(self, weight: Tensor) -> Tensor:
        """How many a weight has taken: a copy, a float32 scalar on the host."""
        optimizer, group = self._of_weight[weight]
        step = optimizer.state[weight]["step"] if self._is_by_weight(weight) else group["step"]
        return torch.tensor(float(step))

    def set_steps(self, steps: Mapping[Tensor, Tensor]) -> None:
        """Let weights have taken so many steps.

        Args:
            steps: that each weight has taken.

        Raises:
            UserError: weights that are counted together have taken different numbers of them.
        """
        together: dict[int, int] = {}
        for weight, step in steps.items():
            optimizer, group = self._of_weight[weight]
            if self._is_by_weight(weight):
                optimizer.state[weight]["step"].copy_(step)
            elif together.setdefault(id(group), int(step)) != int(step):
                raise UserError(
                    f"the checkpoint has weights that took {together[id(group)]} steps and others "
                    f"that took {int(step)}, which this optimizer counts together; go on from it "
                    "with train.engine=native"
                )
            else:
                group["step"] = int(step)

    def _is_by_weight(self, weight: Tensor) -> bool:
        return isinstance(self._of_weight[weight][0], torch.optim.AdamW)
