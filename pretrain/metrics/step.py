"""What a step of training is logged with."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch.distributed as dist

from pretrain.data import source_names
from pretrain.engines.engine import Measured
from pretrain.metrics.expert_load import summarise_load
from pretrain.metrics.utilization import peak_of_device, utilization
from pretrain.trainer import StepResult, Trainer


class Clock:
    """Adds up the seconds spent within it, until they are taken."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The seconds since they were taken last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def metrics_row(
    trainer: Trainer, result: StepResult, lr: float, checkpoint_stall_s: float
) -> dict[str, Any]:
    """The metrics of a step that was taken.

    Args:
        lr: that it was taken with.
        checkpoint_stall_s: how long training has waited for checkpoints since the row before.
    """
    measured, seconds, devices = result.measured, result.seconds, dist.get_world_size()
    waited_s = result.agreed.data_wait_s
    tokens_per_s = trainer.tokens_per_step / seconds
    return {
        "train/step": trainer.progress.step,
        "train/loss": measured.loss,
        "train/tokens": trainer.progress.tokens,
        "train/loss_tokens": measured.loss_tokens,
        "train/seq_len": trainer.config.data.seq_len,
        "train/grad_norm": result.norms.whole,
        "train/lr": lr,
        "perf/tokens_per_s": tokens_per_s,
        "perf/tokens_per_s_per_device": tokens_per_s / devices,
        "perf/step_s": seconds,
        "perf/data_wait_s": waited_s,
        "perf/data_wait_share": waited_s / seconds,
        "perf/checkpoint_stall_s": checkpoint_stall_s,
        **_of_tokens(trainer, measured),
        **summarise_load(measured.expert_counts, measured.dropped),
        **_of_engine(trainer, result),
        **utilization(
            trainer.config,
            trainer.plan,
            float(measured.dropped.sum()),
            seconds,
            devices,
            peak_of_device(trainer.config, trainer.device),
        ),
    }


def _of_engine(trainer: Trainer, result: StepResult) -> dict[str, Any]:
    """What not every engine measures."""
    measured, sent, waited_s = result.measured, result.sent, result.measured.exposed_communication_s
    found = {
        "train/aux_loss": measured.aux_loss,
        "train/z_loss": measured.z_loss,
        "train/grad_norm_by_layer": result.norms.parts or None,
        "perf/exposed_communication_s": waited_s,
        "perf/exposed_communication_share": waited_s and waited_s / result.seconds,
        "perf/sent_bytes": None if sent is None else sent.total(),
        "perf/sent_bytes_by_axis": None if sent is None else _by_axis(sent),
        "perf/pipeline_bubble": measured.pipeline_bubble,
        "perf/pipeline_bubble_predicted": measured.pipeline_bubble_predicted,
    }
    moe = trainer.config.model.moe
    if moe.n_experts:
        found["moe/router_entropy"] = measured.router_entropy
    if moe.n_experts and moe.balance == "bias":
        bias = trainer.engine.routers.selection_bias
        found["moe/selection_bias_range"] = float((bias.amax(-1) - bias.amin(-1)).max())
    return {name: value for name, value in found.items() if value is not None}


def _by_axis(sent: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    by_axis: dict[str, dict[str, int]] = {}
    for (axis, kind), n_bytes in sent.items():
        by_axis.setdefault(axis, {})[kind] = n_bytes
    return by_axis


def _of_tokens(trainer: Trainer, measured: Measured) -> dict[str, Any]:
    names = source_names(trainer.config.data)
    parts = zip(names, measured.by_source, strict=True)
    by_source = {name: part for name, part in parts if part.tokens}
    return {
        "train/loss_by_source": {name: part.loss for name, part in by_source.items()},
        "train/loss_tokens_by_source": {name: part.tokens for name, part in by_source.items()},
        "train/loss_by_position": [part.loss for part in measured.by_position],
        "train/loss_tokens_by_position": [part.tokens for part in measured.by_position],
    }
