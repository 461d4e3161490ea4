"""The training loop. Every rank runs `python -m pretrain.train RUN_DIR`, under any launcher.

Exit codes: 0 done, 75 stopped on request (0 under torchrun, which would restart it), 2 a mistake
of the user's, 65 another attempt would fail alike, 70 another rank failed, 1 anything else.
"""

import gc
import os
import sys
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from parallel.lost_rank import RankMonitor
from parallel.mesh import join_ranks, release_groups
from pretrain.attempt import begin_attempt, read_past
from pretrain.config import Config, phases_of, read_run_config
from pretrain.curriculum import Phase, phase_at, phase_of_checkpoint
from pretrain.errors import (
    CANNOT_GO_ON,
    LOST_RANK,
    STOPPED_ON_REQUEST,
    AttemptError,
    TrainingError,
    UserError,
)
from pretrain.evals.held_out import HeldOut, evaluate_late, lacks_evaluation
from pretrain.guard import Verdict
from pretrain.metrics.step import Clock, metrics_row
from pretrain.metrics.survey import is_survey_due, survey
from pretrain.numerics import numerics_of
from pretrain.recorder import Recorder
from pretrain.run_dir import ATTEMPT_VARIABLE, NO_ROOM, RunDirectory
from pretrain.signals import StopRequest
from pretrain.trainer import Trainer


def train(config: Config, run: RunDirectory) -> int:
    """Train to `train.steps`, from the newest checkpoint if there is one. Returns an exit code."""
    stop = StopRequest()
    timeout = timedelta(seconds=config.train.collective_timeout_s)
    device = join_ranks(timeout)
    monitor = RankMonitor(end_for_lost_rank, config.train.hang_timeout_s)
    with monitor, run.exclusive() if dist.get_rank() == 0 else nullcontext():
        attempt = begin_attempt(run)
        monitor.folder = run.folder_of(attempt)
        step, is_stopped = run_phases(config, run, device, attempt, stop, monitor)
        is_first = dist.get_rank() == 0
        if is_first and not is_stopped:
            run.mark_done(config.train.steps, attempt)
        elif is_first:
            run.mark_stopped(step, attempt, stop.reason)
        # Nobody leaves while rank 0 still writes: some launchers end the job with its first rank.
        dist.barrier()
    return STOPPED_ON_REQUEST if is_stopped else 0


def run_phases(
    config: Config,
    run: RunDirectory,
    device: torch.device,
    attempt: int,
    stop: StopRequest,
    monitor: RankMonitor,
) -> tuple[int, bool]:
    """Train one phase after the other. Collective.

    Each ends with a checkpoint, which the next one begins with, as another attempt would.

    Returns:
        How many steps have been trained, and whether it was stopped before all was done.
    """
    phases = phases_of(config)
    recorder, reached = None, 0
    step, past = read_past(config, run)
    phase = phase_at(phases, step)
    if lacks_evaluation(config, run, step):
        phase = phase_of_checkpoint(phases, step)
    while True:
        trainer = Trainer(phase.config, run, device, attempt, past, first_step=phase.first)
        step = trainer.progress.step
        if step < reached:
            # What is recorded of the steps between would stand there twice.
            raise AttemptError(
                f"the checkpoint of step {reached} is damaged; the next attempt goes on from step "
                f"{step}"
            )
        if step > config.train.steps:
            raise UserError(
                f"train.steps = {config.train.steps}, but {run.root} is at step {step} already: it "
                "can only be raised"
            )
        if phase.has(step) or step in (phase.stop, config.train.steps):
            if dist.get_rank() == 0 and not recorder:
                recorder = Recorder(run, attempt, trainer, config)
                print(f"kernels: {numerics_of(config, device)['kernels']}", flush=True)
            if recorder and len(phases) > 1:
                print(phase, flush=True)
            held_out = HeldOut(config, trainer)
            is_stopped = run_steps(trainer, phase, held_out, stop, recorder, monitor)
            del held_out
            step = reached = trainer.progress.step
            if is_stopped or step == config.train.steps:
                break
        # A checkpoint that was damaged at the start, or a rollback, may lead to an earlier phase.
        trainer.engine.close()
        del trainer
        gc.collect()
        release_groups()
        monitor.forget()
        _, past = read_past(config, run)
        phase = phase_at(phases, step)
    if recorder:
        recorder.close()
    return step, is_stopped


def run_steps(
    trainer: Trainer,
    phase: Phase,
    held_out: HeldOut,
    stop: StopRequest,
    recorder: Recorder | None,
    monitor: RankMonitor,
) -> bool:
    """Train until the end of a phase, a request to stop, or a rollback to before the phase; leave a
    checkpoint of the end. Returns whether it was stopped before all was done.
    """
    train, every = trainer.config.train, trainer.config.checkpoint.every
    until = train.steps if phase.stop is None else min(phase.stop, train.steps)
    clock = Clock()
    newest = trainer.progress.step
    if recorder:
        recorder.spent_on("starting")
    beat = partial(monitor.beat, newest)
    stopping = is_missing = not evaluate_late(
        held_out, newest, recorder, beat, lambda: stop.requested
    )
    if recorder:
        recorder.spent_on("evaluation")
    while phase.first <= trainer.progress.step < until and not stopping:
        beat = partial(monitor.beat, trainer.progress.step + 1)
        lr = trainer.lr()
        result = trainer.step(stop.requested, beat)
        stopping = result.agreed.stop_requested
        if recorder:
            recorder.enter(trainer, result)
        if result.verdict:
            beat("recovery", is_slow=True)
            recover(trainer, result.verdict, recorder)
        step = trainer.progress.step
        # Who is asked to stop has little time; the next attempt has the same weights.
        is_evaluated = held_out.is_due(step) and not result.verdict and not stopping
        evaluated = held_out.evaluate(beat, lambda: stop.requested) if is_evaluated else {}
        if recorder and is_evaluated:
            recorder.spent_on("evaluation")
        stopping = stopping or evaluated is None
        is_missing = held_out.is_due(step) and not evaluated
        is_last = step == until or stopping
        is_saved = is_last or (step % every == 0 and not result.verdict)
        # A run that goes on from a checkpoint finds its row: what it has spent until then.
        if not result.verdict and (is_saved or is_evaluated or step % train.log_every == 0):
            surveyed = survey(trainer, lr) if is_survey_due(step, train) else {}
            if recorder:
                row = metrics_row(trainer, result, lr, clock.take())
                recorder.log(row | surveyed | (evaluated or {}) | slowest_rank(monitor))
        if is_saved:
            beat("checkpoint", is_slow=True)
            if recorder:
                recorder.ledger.sync()
            with clock:
                trainer.save(is_last=is_last)
            if recorder:
                recorder.spent_on("checkpoints")
        if recorder:
            recorder.enter_checkpoint(trainer)
    monitor.beat(trainer.progress.step, "end", is_slow=True)
    # Of the last step as of any other, the next attempt adds the evaluation.
    return stopping and (is_missing or trainer.progress.step < train.steps)


def recover(trainer: Trainer, verdict: Verdict, recorder: Recorder | None) -> None:
    """Get past a batch that left the weights as they were. Collective."""
    rollback = trainer.skip(verdict)
    if rollback is None:
        if recorder:
            recorder.warn_of_skip(verdict)
        return
    if recorder:
        recorder.enter_rollback(rollback)
    trainer.roll_back(rollback)
    if recorder:
        recorder.enter_rolled_back(trainer, rollback)


def slowest_rank(monitor: RankMonitor) -> dict[str, Any]:
    slowest = monitor.slowest
    if slowest is None:
        return {}
    return {
        "perf/slowest_rank": slowest.rank,
        "perf/slowest_over_median": slowest.over_median,
    }


def end_for_lost_rank(message: str) -> NoReturn:
    """End this process, whose groups have lost a rank: their threads would abort a clean-up."""
    os.write(sys.stderr.fileno(), f"error: {message}\n".encode())
    os._exit(LOST_RANK)


def main() -> int:
    # What has been imported stays: looking for garbage there would stop one rank, then another.
    gc.freeze()
    gc.enable()
    run = RunDirectory(Path(sys.argv[1]))
    try:
        return train(read_run_config(run), run)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is not None:
            tell(str(error))
            return CANNOT_GO_ON if isinstance(error, TrainingError) else int(code)
        if isinstance(error, dist.DistError):
            tell(f"the ranks did not come together: {error}")
            return LOST_RANK
        if isinstance(error, OSError) and run.is_cause_of(error):
            tell(run.explain(error))
            is_here_to_stay = not run.root.is_dir() or error.errno in NO_ROOM
            return CANNOT_GO_ON if is_here_to_stay else 1
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def tell(what: str) -> None:
    # The log may lie on the disk that is full.
    with suppress(OSError):
        print(f"error: {what}", file=sys.stderr, flush=True)


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and ATTEMPT_VARIABLE not in os.environ


if __name__ == "__main__":
    code = main()
    if code == STOPPED_ON_REQUEST and is_under_torchrun():
        # It would start again whoever does not exit with 0; stopped.json tells the two apart.
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may still free tensors, and abort a process whose interpreter ends meanwhile.
    os._exit(code)
