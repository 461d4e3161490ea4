"""What costs a pass over the weights, or a question to every device, and so is asked less often."""

from typing import Any

import torch
import torch.distributed as dist

from parallel.gradients import Norms
from pretrain.config import TrainConfig
from pretrain.memory import resident_peak
from pretrain.trainer import Trainer


def is_survey_due(step: int, train: TrainConfig) -> bool:
    """Whether the row of a step tells of weights and memory."""
    return step % (train.log_every * train.survey_every) == 0


def survey(trainer: Trainer, lr: float) -> dict[str, Any]:
    """The metrics of weights and memory after a step that was taken with `lr`. Collective."""
    norms = trainer.engine.weight_and_update_norms(lr)
    return {**(_of_weights(norms) if norms else {}), **_memory(trainer.device)}


def _of_weights(norms: Norms) -> dict[str, Any]:
    whole, parts = norms.whole.tolist(), norms.parts.tolist()
    return {
        "train/weight_norm": whole[0],
        "train/weight_norm_by_layer": parts[0],
        "train/update_ratio": _ratio(whole[1], whole[0]),
        "train/update_ratio_by_layer": [_ratio(*pair) for pair in zip(*parts[::-1], strict=True)],
    }


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
        now = {"perf/memory_peak": resident_peak()}
    most = torch.tensor(list(now.values()), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(now, most.tolist(), strict=True))
