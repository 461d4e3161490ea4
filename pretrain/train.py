"""The training loop. Every rank runs `python -m pretrain.train RUN_DIR`."""

import re
import sys
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.mesh import join_ranks
from pretrain.checkpoint.store import Progress
from pretrain.config import Config, read_run_config
from pretrain.errors import LOST_RANK, STOPPED_ON_REQUEST, UserError
from pretrain.metrics.expert_load import summarise_load
from pretrain.metrics.sinks import JsonlSink, MetricsWriter, WandbSink, step_line
from pretrain.run_dir import RunDirectory
from pretrain.signals import StopRequest
from pretrain.trainer import StepResult, Trainer

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def train(config: Config, run: RunDirectory) -> int:
    """Train to `train.steps`, from the newest checkpoint if there is one. Returns an exit code."""
    stop = StopRequest()
    device = join_ranks(COLLECTIVE_TIMEOUT)
    with run.exclusive() if dist.get_rank() == 0 else nullcontext():
        trainer = Trainer(config, run, device)
        if trainer.progress.step > config.train.steps:
            raise UserError(
                f"train.steps = {config.train.steps}, but {run.root} is at step "
                f"{trainer.progress.step} already: it can only be raised"
            )
        metrics = open_metrics(config, run, trainer.progress) if dist.get_rank() == 0 else None
        run_steps(trainer, stop, metrics)
        if metrics:
            metrics.close()
        is_done = trainer.progress.step == config.train.steps
        if is_done and dist.get_rank() == 0:
            run.mark_done(config.train.steps)
        # Nobody leaves while rank 0 still writes: some launchers end the job with its first rank.
        dist.barrier()
    return 0 if is_done else STOPPED_ON_REQUEST


def run_steps(trainer: Trainer, stop: StopRequest, metrics: MetricsWriter | None) -> None:
    """Train until the last step or a request to stop, and leave a checkpoint of the end."""
    config, progress = trainer.config, trainer.progress
    stopping = False
    while progress.step < config.train.steps and not stopping:
        lr, began = trainer.lr(), time.perf_counter()
        result = trainer.step(stop.requested)
        seconds = time.perf_counter() - began
        stopping = result.measured.stop_requested
        is_last = progress.step == config.train.steps or stopping
        if metrics and (is_last or progress.step % config.train.log_every == 0):
            row = metrics_row(trainer, result, lr, seconds)
            metrics.log(row)
            print(step_line(row, config.train.steps), flush=True)
        if is_last or progress.step % config.checkpoint.every == 0:
            trainer.save()


def open_metrics(config: Config, run: RunDirectory, progress: Progress) -> MetricsWriter:
    truth = JsonlSink(run.metrics)
    truth.cut_back(progress.step)
    settings = config.model_dump(mode="json")
    mirror = WandbSink(run, config.wandb.mode, config.wandb.project, run.root.name, settings)
    return MetricsWriter([truth, mirror])


def metrics_row(trainer: Trainer, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    measured = result.measured
    return {
        "train/step": trainer.progress.step,
        "train/loss": measured.loss,
        "train/aux_loss": measured.aux_loss,
        "train/z_loss": measured.z_loss,
        "train/tokens": trainer.progress.tokens,
        "train/grad_norm": result.grad_norm,
        "train/lr": lr,
        "perf/tokens_per_s": trainer.tokens_per_step / seconds,
        "perf/step_s": seconds,
        "perf/data_wait_s": result.data_wait_s,
        **summarise_load(measured.expert_counts, measured.dropped),
    }


def main() -> int:
    run = RunDirectory(Path(sys.argv[1]))
    try:
        return train(read_run_config(run), run)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is not None:
            print(f"error: {error}", file=sys.stderr)
            return int(code)
        if lost := describe_lost_rank(error):
            print(f"error: {lost}", file=sys.stderr)
            return LOST_RANK
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def describe_lost_rank(error: Exception) -> str | None:
    """What to tell of an error that means another rank is gone; None for any other error."""
    reason = str(error).splitlines()[0] if str(error) else ""
    if not isinstance(error, dist.DistError) and not re.search(
        r"Connection (closed|reset)|Broken pipe|Timed out waiting", reason
    ):
        return None
    collective = traceback.extract_tb(error.__traceback__)[-1].name
    return f"another rank is gone, noticed in {collective}: {reason}"


if __name__ == "__main__":
    sys.exit(main())
