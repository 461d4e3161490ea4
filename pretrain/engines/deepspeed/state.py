"""Weights and moments that ZeRO has flattened and shared out, as rows of whole tensors."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from pretrain.checkpoint.contents import MODEL, OPTIMIZER
from pretrain.checkpoint.region import Region
from pretrain.errors import UserError
from pretrain.optim import moments

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """The weights in fp32 and AdamW's state of them, by the names of a checkpoint.

    A rank has the rows of each that FSDP would give it, on the host; for a moment, on all ranks,
    one tensor is whole on the device.

    Args:
        optimizer: ZeRO's, around torch's AdamW.
        weights: by their names in the model.
    """

    def __init__(
        self, optimizer: Any, weights: Mapping[str, nn.Parameter], device: torch.device
    ) -> None:
        self._optimizer, self._weights, self._device = optimizer, weights, device
        self._is_stage_3 = any(hasattr(weight, "ds_id") for weight in weights.values())
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._filled: dict[str, Tensor | Region] = {}
        self.link()

    def link(self) -> None:
        """Make the moments that AdamW would make in its first step, and tell the weights where
        they are.
        """
        flat = self._flat()
        for partition in flat:
            moments(self._optimizer.optimizer, partition)
        for weight in self._weights.values():
            if (fragment := getattr(weight, "_hp_mapping", None)) is not None:
                partition = flat[fragment.param_group_index]
                fragment.set_optim_state_fragment(partition, self._of(partition))

    @torch.no_grad()
    def initialize(self, value: Callable[[str], Tensor]) -> None:
        """Stand before the first step, with whole weights of these values. Collective."""
        self._forget()
        for name, weight in self._weights.items():
            self._write(weight, value(name).to(self._device, torch.float32))

    def steps(self) -> int:
        """How often the weights have been updated."""
        return int(self._of(self._flat()[0])["step"].item())

    def tensors(self) -> dict[str, Tensor | Region]:
        """What this rank has of all of it. Collective."""
        step = torch.tensor(float(self.steps()))
        found: dict[str, Tensor | Region] = {}
        for name, weight in self._weights.items():
            for key, whole in self._whole(name, weight):
                first, rows = self._place(whole.shape)
                if rows:
                    local = whole.narrow(0, first, rows).to("cpu", copy=True)
                    found[key] = _region(local, whole.shape, first)
            found[_step(name)] = step.clone()
        return found

    def to_fill(self, *, has_moments: bool) -> dict[str, Tensor | Region]:
        """Room for the same.

        Args:
            has_moments: whether there are any; if not, it will be as before the first step.
        """
        self._filled = {}
        for name, weight in self._weights.items():
            shape = whole_shape(weight)
            first, rows = self._place(shape)
            for key in _keys(name) if has_moments else _keys(name)[:1]:
                if rows:
                    self._filled[key] = _region(torch.empty(rows, *shape[1:]), shape, first)
            if has_moments:
                self._filled[_step(name)] = torch.empty(())
        return self._filled

    @torch.no_grad()
    def take_over(self) -> None:
        """Go on with what has been filled. Collective.

        Raises:
            UserError: weights have been updated different numbers of times.
        """
        self._forget()
        steps = self._filled_steps()
        for partition in self._flat():
            self._of(partition)["step"].fill_(steps)
        for name, weight in self._weights.items():
            key, *of_moments = _keys(name)
            self._write(weight, self._gather(key, weight))
            for moment, key in zip(MOMENTS, of_moments, strict=True):
                if steps:
                    self._set(weight, self._gather(key, weight), moment)
        self._filled = {}

    def _flat(self) -> list[nn.Parameter]:
        """This rank's partitions of all weights, as the optimizer has them."""
        if self._is_stage_3:
            of_stage_3: list[nn.Parameter] = self._optimizer.fp32_partitioned_groups_flat
            return of_stage_3
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def _of(self, partition: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._optimizer.optimizer.state[partition]
        return state

    def _forget(self) -> None:
        """Of moments, what lies between the weights as well."""
        for partition in self._flat():
            for value in self._of(partition).values():
                value.zero_()

    def _filled_steps(self) -> float:
        steps: dict[float, str] = {}
        for name in self._weights:
            step = self._filled.get(_step(name), torch.zeros(()))
            assert isinstance(step, Tensor)
            steps[step.item()] = name
        if len(steps) > 1:
            found = ", ".join(f"{name} {count:g} times" for count, name in sorted(steps.items()))
            raise UserError(
                f"weights have been updated different numbers of times: {found}; ZeRO counts the "
                "steps of many together. Go on with train.engine=native"
            )
        (only,) = steps
        return only

    def _whole(self, name: str, weight: nn.Parameter) -> Any:
        """One after the other. Collective."""
        key, *of_moments = _keys(name)
        yield key, safe_get_full_fp32_param(weight).detach()
        for moment, key in zip(MOMENTS, of_moments, strict=True):
            yield key, safe_get_full_optimizer_state(weight, moment).detach()

    def _place(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """This rank's first row, and how many it has, as torch.chunk cuts them."""
        most = self._most_rows(shape)
        first = min(self._rank * most, shape[0])
        return first, min(most, shape[0] - first)

    def _most_rows(self, shape: torch.Size | tuple[int, ...]) -> int:
        return math.ceil(shape[0] / self._ranks)

    def _gather(self, key: str, weight: nn.Parameter) -> Tensor:
        """The whole of what the ranks have filled."""
        shape = whole_shape(weight)
        most = self._most_rows(shape)
        mine = torch.zeros(most, *shape[1:], device=self._device)
        region = self._filled.get(key)
        if isinstance(region, Region):
            mine[: len(region.local)] = region.local
        whole = mine.new_empty(self._ranks * most, *shape[1:])
        dist.all_gather_into_tensor(whole, mine)
        return whole[: shape[0]]

    def _write(self, weight: nn.Parameter, whole: Tensor) -> None:
        # Writing counts on one rank, which sends it to all.
        gathered = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
        with gathered if self._is_stage_3 else nullcontext():
            weight.copy_(whole)
        # The optimizer's own, in bf16 not rounded.
        self._set(weight, whole)

    def _set(self, weight: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        if not self._is_stage_3:
            if moment is None:
                safe_set_full_fp32_param(weight, whole)
            else:
                safe_set_full_optimizer_state(weight, whole, moment)
            return
        size = len(_partition(weight))
        local = whole.flatten()[self._rank * size : (self._rank + 1) * size]
        # What it sets whole has to divide among the ranks.
        padded = F.pad(local, (0, size - len(local)))
        if moment is None:
            safe_set_local_fp32_param(weight, padded)
        else:
            safe_set_local_optimizer_state(weight, padded, moment)


def whole_shape(weight: nn.Parameter) -> tuple[int, ...]:
    """Of a weight that stage 3 may have made an empty vector of."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def stored(weight: nn.Parameter) -> Tensor:
    """What this rank keeps of a weight between steps: all of it, or with stage 3 a range of it."""
    if not hasattr(weight, "ds_id"):
        return weight.detach()
    partition = _partition(weight)
    elements = math.prod(whole_shape(weight)) - dist.get_rank() * len(partition)
    # Behind the weight's end there is anything.
    return partition[: max(0, elements)]


def _partition(weight: nn.Parameter) -> Tensor:
    """With stage 3; equally long on all ranks."""
    partition: Tensor = weight.ds_tensor  # type: ignore[attr-defined]
    return partition.detach()


def _keys(name: str) -> list[str]:
    return [MODEL + name, *(f"{OPTIMIZER}{name}.{moment}" for moment in MOMENTS)]


def _step(name: str) -> str:
    return f"{OPTIMIZER}{name}.step"


def _region(local: Tensor, shape: torch.Size | tuple[int, ...], first: int) -> Region:
    return Region(local, shape, (first, *(0 for _ in shape[1:])))
