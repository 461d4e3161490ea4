"""What costs a pass over the weights, or a question to every device, and so is asked less often."""

import resource
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fsdp import local_tensor
from parallel.gradients import Norms, add_to_parts, part_of, sum_squares
from pretrain.config import TrainConfig
from pretrain.optim import in_parts
from pretrain.trainer import Trainer


def is_survey_due(step: int, train: TrainConfig) -> bool:
    """Whether the row of a step tells of weights and memory."""
    return step % (train.log_every * train.survey_every) == 0


def survey(trainer: Trainer, lr: float) -> dict[str, Any]:
    """The metrics of weights and memory after a step that was taken with `lr`. Collective."""
    norms = weight_and_update_norms(trainer, lr)
    whole, parts = norms.whole.tolist(), norms.parts.tolist()
    return {
        "train/weight_norm": whole[0],
        "train/weight_norm_by_layer": parts[0],
        "train/update_ratio": _ratio(whole[1], whole[0]),
        "train/update_ratio_by_layer": [_ratio(*pair) for pair in zip(*parts[::-1], strict=True)],
        **_memory(trainer.device),
    }


@torch.no_grad()
def weight_and_update_norms(trainer: Trainer, lr: float) -> Norms:
    """Of all weights, and of the step that has led to them: [2] and [2, L + 2]. Collective."""
    named = list(trainer.weights.named_parameters())
    group_of = {
        weight: group for group in trainer.optimizer.param_groups for weight in group["params"]
    }
    squares = [
        torch.stack(_squares(weight, trainer.optimizer.state.get(weight, {}), group_of[weight], lr))
        for _, weight in named
    ]
    n_layers = trainer.config.model.n_layers
    shares = add_to_parts(
        torch.stack(squares, dim=-1),
        [weight for _, weight in named],
        [part_of(name, n_layers) for name, _ in named],
        n_layers,
        dist.get_world_size() // trainer.layout.pp,
    )
    return sum_squares(shares)


def _squares(
    weight: Tensor, state: dict[str, Any], group: dict[str, Any], lr: float
) -> tuple[Tensor, Tensor]:
    """Of what this rank stores of a weight, and of its last update.

    AdamW's state after a step tells what the step was: no copy of the weights is needed. From
    w = (1 - lr decay) before - update, the difference of w and before is
    -(update + lr decay w) / (1 - lr decay).
    """
    mine = local_tensor(weight)
    of_weight, of_update = mine.new_zeros(2).unbind()
    if not state:
        return mine.float().square().sum(), of_update
    (beta_1, beta_2), steps = group["betas"], float(state["step"])
    shrinking = lr * group["weight_decay"]
    size, norm = lr / (1 - beta_1**steps), (1 - beta_2**steps) ** 0.5
    moments = (local_tensor(state[name]) for name in ("exp_avg", "exp_avg_sq"))
    for w, m, v in in_parts(mine, *moments):
        update = m.float() / (v.float().sqrt() / norm).add_(group["eps"])
        update.mul_(size).add_(w, alpha=shrinking)
        of_weight = of_weight + w.square().sum()
        of_update = of_update + update.square_().sum()
    return of_weight, of_update / (1 - shrinking) ** 2


def _ratio(update: float, weight: float) -> float:
    return update / weight if update else 0.0


def _memory(device: torch.device) -> dict[str, Any]:
    """The most over the ranks. Collective."""
    if device.type == "cuda":
        now = {
            "perf/memory_allocated": torch.cuda.memory_allocated(device),
            "perf/memory_reserved": torch.cuda.memory_reserved(device),
            "perf/memory_peak": torch.cuda.max_memory_allocated(device),
        }
    else:
        now = {"perf/memory_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    most = torch.tensor(list(now.values()), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(now, most.tolist(), strict=True))
