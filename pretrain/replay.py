"""Train one step of a run again, and change nothing of the run.

Every rank of the same layout runs `python -m pretrain.replay RUN_DIR ATTEMPT FIRST_TOKEN`, under
any launcher: the attempt that tried the step, and the place of its batch in the stream, both as
`farspan replay` lists them. A fourth argument is the number of steps to train again at most. Rank 0
prints what it found as one JSON object.

Exit codes: 0 replayed, whether it is the same or not, 2 a mistake of the user's, 70 another rank
failed, 1 anything else.
"""

import math
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parallel.fsdp import local_tensor
from parallel.gradients import UpdatesInBackward
from parallel.lost_rank import RankMonitor
from parallel.mesh import join_ranks
from pretrain.answer import answer
from pretrain.config import Config, read_run_config
from pretrain.engines.native import NativeEngine
from pretrain.errors import UserError
from pretrain.guard import Past
from pretrain.ledger import LedgerError, Skipped, Trained
from pretrain.numerics import numerics_of
from pretrain.replay_plan import MAX_STEPS_AGAIN, ReplayPlan, plan_replay
from pretrain.run_dir import RunDirectory
from pretrain.train import end_for_lost_rank
from pretrain.trainer import Trainer

# A replay of more steps than these says now and then how far it is.
QUIET_STEPS = 20

# Where in the model, and what.
Found = tuple[float, str]


@dataclass(frozen=True)
class Replayed:
    """
    Attributes:
        checkpoint: the step that the replay went on from; 0 is the beginning.
        loss, grad_norm: of the step, as they are now.
        compared: how many of the steps before it were trained again and compared with the ledger.
        differs: what is not bitwise as the ledger has it, of this step and of those before it.
        caveats: why it need not be, or what is not known of that.
        not_finite: the first output of a layer that is not finite, on each rank that has it; or
            else the gradients that are not.
    """

    checkpoint: int
    loss: float
    grad_norm: float
    compared: int
    differs: list[str]
    caveats: list[str]
    not_finite: dict[int, str]


def replay(
    config: Config,
    run: RunDirectory,
    attempt: int,
    first_token: int,
    max_steps_again: int = MAX_STEPS_AGAIN,
) -> Replayed:
    """Collective.

    Raises:
        UserError: on all ranks; there is no such batch, this is not the number of ranks that it
            had, or more than `max_steps_again` steps would have to be trained again.
    """
    device = join_ranks(timedelta(seconds=config.train.collective_timeout_s))
    with RankMonitor(end_for_lost_rank, config.train.hang_timeout_s) as monitor:
        plan = _plan_together(config, run, attempt, first_token)
        _check_ranks(plan)
        plan.check(plan.checkpoint, max_steps_again)
        trainer = _stand_before(run, device, plan, max_steps_again)
        return _train_again(trainer, plan, monitor)


def _plan_together(config: Config, run: RunDirectory, attempt: int, first_token: int) -> ReplayPlan:
    """The plan of rank 0, which alone reads the ledger; or its error."""
    planned: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            planned = [plan_replay(config, run, attempt, first_token)]
        except (UserError, LedgerError) as error:
            planned = [error]
    dist.broadcast_object_list(planned, src=0)
    if isinstance(planned[0], Exception):
        raise planned[0]
    plan: ReplayPlan = planned[0]
    return plan


def _check_ranks(plan: ReplayPlan) -> None:
    had, has = plan.of_attempt["ranks"], dist.get_world_size()
    if had != has:
        raise UserError(
            f"attempt {plan.target.attempt} had {had} ranks, and the replay was started with "
            f"{has}: the layout would be another. Start it with {had}"
        )


def _stand_before(
    run: RunDirectory, device: torch.device, plan: ReplayPlan, max_steps_again: int
) -> Trainer:
    """A trainer at the newest checkpoint before the batch that is whole, or at the beginning."""
    for warning in plan.warnings:
        _say(f"warning: {warning}")
    phase, past = plan.phase, Past(plan.skipped)
    stand_at = partial(Trainer, phase.config, run, device, None, past, first_step=phase.first)
    trainer = None
    try:
        trainer = stand_at(plan.checkpoint)
    except UserError:
        if not plan.checkpoint:
            raise
    if trainer is None:
        # All that it may load are damaged, as has been told. The beginning is as good.
        plan.check(0, max_steps_again)
        trainer = stand_at(0)
    checkpoint = trainer.progress.step
    plan.check(checkpoint, max_steps_again)
    _say(plan.describe(checkpoint))
    return trainer


def _say(text: str) -> None:
    """The result alone goes to standard output."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _train_again(trainer: Trainer, plan: ReplayPlan, monitor: RankMonitor) -> Replayed:
    checkpoint, target, engine = trainer.progress.step, plan.target, trainer.engine
    assert isinstance(engine, NativeEngine)
    recorded = {batch.first_token: batch for batch in plan.before}
    differs: list[str] = []
    found: list[Found] = []
    spoilt: set[nn.Parameter] = set()
    compared = 0
    while trainer.first_token != target.first_token or not trainer.plan.pieces.size:
        beat = partial(monitor.beat, trainer.progress.step + 1)
        beat("data")
        trainer.pass_over()
        batch = trainer.read_batch()
        assert trainer.first_token <= target.first_token, "the ledger has no batch there"
        is_target = trainer.first_token == target.first_token
        hooks = _hooks(engine, found) if is_target else []
        if is_target and engine.updates:
            _watch(engine.updates, spoilt)
        beat("forward and backward")
        measured, _ = trainer.backward(batch)
        for hook in hooks:
            hook.remove()
        if is_target and not found:
            found = _gradients(engine.weights, spoilt)
        beat("optimizer")
        norms, _ = trainer.finish_step(measured)
        then = target if is_target else recorded.get(trainer.first_token)
        if then:
            differs += _differences(then, measured.loss, norms.whole)
            compared += not is_target
        _say_how_far(trainer.progress.step - checkpoint, target.step - checkpoint)
    monitor.beat(target.step, "end", is_slow=True)
    return Replayed(
        checkpoint,
        measured.loss,
        norms.whole,
        compared,
        differs,
        plan.caveats(checkpoint, numerics_of(trainer.config, trainer.device)) + _chance(trainer),
        _first_of_all_ranks(found),
    )


def _chance(trainer: Trainer) -> list[str]:
    if trainer.device.type == "cpu" or trainer.config.train.deterministic:
        return []
    return ["on GPUs a step need not come out bitwise the same twice (train.deterministic=false)"]


def _say_how_far(done: int, steps: int) -> None:
    if steps > QUIET_STEPS and done < steps and done % (steps // 10) == 0:
        _say(f"trained {done:,} of {steps:,} steps again")


def _first_of_all_ranks(found: list[Found]) -> dict[int, str]:
    """The ranks on which it was earliest in the model: from there it went on to others."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    earliest = min((place for found in of_ranks for place, _ in found), default=0)
    return {
        rank: text
        for rank, found in enumerate(of_ranks)
        for place, text in found
        if place == earliest
    }


def _differences(then: Trained | Skipped, loss: float, grad_norm: float) -> list[str]:
    numbers = ("loss", then.loss, loss), ("gradient norm", then.grad_norm, grad_norm)
    return [
        f"step {then.step}, {name} of the batch at token {then.first_token}: {theirs!r} in the "
        f"ledger, {ours!r} now"
        for name, theirs, ours in numbers
        if theirs != ours and not (math.isnan(theirs) and math.isnan(ours))
    ]


def _hooks(engine: NativeEngine, found: list[Found]) -> list[RemovableHandle]:
    """Let `found` be told the first module whose output is not finite."""

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found:
            for tensor in _tensors(output):
                if not bool(tensor.isfinite().all()):
                    text = f"the output of {name} ({type(module).__name__}) is not finite"
                    found.append((_place_in_model(name), text))
                    return

    return [
        module.register_forward_hook(partial(look, name))
        for stage in engine.parallelised.stages
        for name, module in stage.model.named_modules()
        if name
    ]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield local_tensor(output.detach())
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _place_in_model(name: str) -> float:
    """The number of the layer; -1 before the layers, infinity after them."""
    if name.startswith("layers."):
        return float(name.split(".")[1])
    return -1.0 if name.startswith("embedding") else math.inf


def _watch(updates: UpdatesInBackward, spoilt: set[nn.Parameter]) -> None:
    """Let `spoilt` be told the weights whose gradients are not finite, before these are freed."""
    update = updates.update

    def look_and_update(weight: nn.Parameter) -> None:
        if not _has_finite_gradient(weight):
            spoilt.add(weight)
        update(weight)

    updates.update = look_and_update


def _gradients(weights: nn.Module, spoilt: Set[nn.Parameter]) -> list[Found]:
    """The weights whose gradients are not finite, where every output was.

    Args:
        spoilt: those of them that are known already.
    """
    names = [
        name
        for name, weight in weights.named_parameters()
        if weight in spoilt or not _has_finite_gradient(weight)
    ]
    if not names:
        return []
    text = f"every output is finite, the gradient of {names[-1]} is not ({len(names)} such)"
    return [(math.inf, text)]


def _has_finite_gradient(weight: nn.Parameter) -> bool:
    return weight.grad is None or bool(local_tensor(weight.grad).isfinite().all())


def main() -> Replayed:
    directory, attempt, first_token, *max_steps_again = _arguments()
    run = RunDirectory(Path(directory))
    config = read_run_config(run, attempt)
    return replay(config, run, attempt, first_token, *max_steps_again)


def _arguments() -> tuple[Any, ...]:
    directory, *numbers = sys.argv[1:] or [""]
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"the arguments are {' '.join(sys.argv[1:]) or 'missing'}; they must be RUN_DIR "
            "ATTEMPT FIRST_TOKEN [MAX_STEPS_AGAIN], as `farspan replay RUN --step N` lists them"
        )
    return directory, *map(int, numbers)


if __name__ == "__main__":
    answer(main)
