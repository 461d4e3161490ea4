"""The learning rate of each step, a pure function of the step."""

import math

from pretrain.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    From `from_step` to `to_step` of the schedule, linear warmup, then `constant`; `cosine` down to
    `min_lr` (Loshchilov & Hutter 2016, arXiv:1608.03983); or `wsd`, constant and a linear decay at
    the end (Hu et al. 2024, arXiv:2404.06395). After that it stays.
    """
    end = steps if schedule.to_step is None else schedule.to_step
    step, steps = max(0, step - schedule.from_step), end - schedule.from_step
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    progress = min(1.0, progress)
    return peak * (schedule.min_lr + (1 - schedule.min_lr) * _height(progress, schedule))


def _height(progress: float, schedule: ScheduleConfig) -> float:
    """From 1 at the peak to 0 at the end."""
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.name == "wsd" and progress > 1 - schedule.decay_share:
        return (1 - progress) / schedule.decay_share
    return 1.0
