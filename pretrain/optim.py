"""The optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.apply import Parallelised
from parallel.fsdp import local_tensor
from parallel.gradients import UpdatesInBackward
from pretrain.config import OptimConfig

# Elements of a weight that are updated at a time: float32 copies exist of no more.
UPDATED_AT_A_TIME = 1 << 24


class AdamWByWeight(torch.optim.AdamW):
    """AdamW that updates one weight after the other, with moments stored in a type of choice.

    The arithmetic is that of float32 and in the order of torch's own: with float32 moments, its
    bits on a CPU. Moments in bfloat16 are rounded to nearest (DeepSeek-V3, arXiv:2412.19437,
    section 3.3.2).

    Args:
        settings: those of `torch.optim.AdamW`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, state_dtype: torch.dtype, **settings: Any
    ) -> None:
        super().__init__(groups, foreach=False, **settings)
        self.state_dtype = state_dtype
        self._group_of = {
            weight: group for group in self.param_groups for weight in group["params"]
        }

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        assert closure is None, "no loss is computed again"
        for weight in self._group_of:
            if weight.grad is not None:
                self.update(weight)

    @torch.no_grad()
    def update(self, weight: nn.Parameter) -> None:
        """Update a weight by its gradient."""
        assert weight.grad is not None
        group, state = self._group_of[weight], moments(self, weight)
        state["step"] += 1
        step, (beta_1, beta_2) = state["step"].item(), group["betas"]
        step_size = group["lr"] / (1 - beta_1**step)
        norm = (1 - beta_2**step) ** 0.5
        tensors = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
        for w, grad, stored_m, stored_v in in_parts(*map(local_tensor, tensors)):
            m, v, grad = stored_m.float(), stored_v.float(), grad.float()
            w.mul_(1 - group["lr"] * group["weight_decay"])
            m.lerp_(grad, 1 - beta_1)
            v.mul_(beta_2).addcmul_(grad, grad, value=1 - beta_2)
            w.addcdiv_(m, (v.sqrt() / norm).add_(group["eps"]), value=-step_size)
            # Without a copy, where they are float32 already.
            stored_m.copy_(m)
            stored_v.copy_(v)


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each, UPDATED_AT_A_TIME of them."""
    return zip(*(x.view(-1).split(UPDATED_AT_A_TIME) for x in tensors), strict=True)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101); only matrices decay.

    Weights on different meshes stand in different groups, because one fused update cannot span
    two meshes.
    """
    by_kind: dict[tuple[object, ...], list[nn.Parameter]] = defaultdict(list)
    for weight in model.parameters():
        mesh = weight.device_mesh if isinstance(weight, DTensor) else None
        by_kind[mesh, weight.ndim >= 2].append(weight)
    groups = [
        {"params": weights, "weight_decay": config.weight_decay if decays else 0.0}
        for (_, decays), weights in by_kind.items()
    ]
    state_dtype = getattr(torch, config.state_dtype)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.in_backward or state_dtype != torch.float32:
        return AdamWByWeight(groups, state_dtype=state_dtype, **settings)
    return torch.optim.AdamW(groups, **settings)


def update_in_backward(
    parallelised: Parallelised, optimizer: torch.optim.AdamW, device: torch.device
) -> UpdatesInBackward:
    """Let backward passes update the weights. Those whose gradient ranks of `tp` have yet to sum
    are left to `optimizer.step`.
    """
    assert isinstance(optimizer, AdamWByWeight)
    summed_later = {id(weight) for weight in parallelised.replicas.whole.values()}
    named = parallelised.weights.named_parameters()
    weights = ((name, weight) for name, weight in named if id(weight) not in summed_later)
    n_layers = parallelised.stages[0].model.config.n_layers
    return UpdatesInBackward(weights, optimizer.update, n_layers, device)


def moments(optimizer: torch.optim.AdamW, weight: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state of one weight, made if there has been no step yet."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if not state:
        dtype = optimizer.state_dtype if isinstance(optimizer, AdamWByWeight) else weight.dtype
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(weight, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(weight, dtype=dtype)
    return state


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step."""
    for group in optimizer.param_groups:
        settings: dict[str, Any] = group
        settings["lr"] = lr
