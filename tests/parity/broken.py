"""Collectives that are deliberately wrong, one or more for each axis: none may go unnoticed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import fsdp_traffic
from parallel.comm import Pending
from parallel.context import convolution, linear, ring
from parallel.replicas import Replicas, TiedCopy
from parallel.stage import Stage
from pretrain.trainer import Trainer


def own_gradients_in_fsdp(trainer: Trainer) -> None:
    """dp_shard: a sum left out."""
    reduce_scatter = fsdp_traffic.reduce_scatter_single

    def own_part(output: Tensor, input: Tensor, group: Any, **options: Any) -> Any:
        work = reduce_scatter(output, input, group=group, **options)
        output.copy_(input.chunk(group.size())[group.rank()])
        return work

    fsdp_traffic.reduce_scatter_single = own_part


def own_gradients_in_hsdp(trainer: Trainer) -> None:
    """dp_replicate: a sum left out."""
    replicas = trainer.engine.mesh.weights["dp_replicate"].get_group()
    all_reduce = dist.all_reduce

    def all_reduce_elsewhere(tensor: Tensor, *options: Any, group: Any = None, **more: Any) -> Any:
        return None if group is replicas else all_reduce(tensor, *options, group=group, **more)

    dist.all_reduce = all_reduce_elsewhere


def own_part_of_activations(trainer: Trainer) -> None:
    """tp: a sum left out."""
    _change_results("reduce_scatter", lambda pending: pending.source[pending.comm.rank].clone())


def shards_in_the_wrong_order(trainer: Trainer) -> None:
    """tp: a wrong split."""
    _change_results("all_gather", lambda pending: pending.out.flip(0))


def own_gradients_of_replicas(trainer: Trainer) -> None:
    """tp: the gradient of one rank's tokens for a weight that all have whole."""
    Replicas.sum_gradients = lambda replicas: replicas.tied.sum_gradients()


def rows_of_other_tokens(trainer: Trainer) -> None:
    """ep: a wrong split."""
    _change_results(
        "all_to_all",
        lambda pending: pending.out.roll(1, 0) if pending.out.is_floating_point() else pending.out,
    )


def stale_activations(trainer: Trainer) -> None:
    """pp: a stage works on what arrived for the microbatch before."""
    forward = Stage.forward

    def forward_on_stale(stage: Stage, x: Tensor, labels: Tensor) -> Tensor:
        if not stage.is_first:
            stale = getattr(stage, "stale", x)
            stage.stale = x.detach()
            x = x + (stale - x).detach()
        return forward(stage, x, labels)

    Stage.forward = forward_on_stale


def stale_gradients(trainer: Trainer) -> None:
    """pp: a stage is given the gradient of the microbatch before."""
    forward = Stage.forward

    def forward_to_stale(stage: Stage, x: Tensor, labels: Tensor) -> Tensor:
        out = forward(stage, x, labels)
        if not stage.is_last:
            out.register_hook(previous_gradient(stage))
        return out

    def previous_gradient(stage: Stage) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            stale = getattr(stage, "stale_gradient", gradient)
            stage.stale_gradient = gradient.clone()
            return stale

        return hook

    Stage.forward = forward_to_stale


def forgotten_halo(trainer: Trainer) -> None:
    """cp: a block's convolution begins with zeros."""
    rows = convolution._rows
    convolution._rows = lambda *of_block: torch.zeros_like(rows(*of_block))


def state_not_reset(trainer: Trainer) -> None:
    """cp: a document that starts in a block reads the state of the one before."""
    make = linear.StatePlan.__init__

    def make_without_resets(plan: linear.StatePlan, *options: Any) -> None:
        make(plan, *options)
        plan.groups = [group._replace(resets=None) for group in plan.groups]

    linear.StatePlan.__init__ = make_without_resets


def state_of_the_wrong_block(trainer: Trainer) -> None:
    """cp: states are chained in the order of the ranks, not of the row."""
    make = linear.StatePlan.__init__

    def make_in_the_wrong_order(plan: linear.StatePlan, *options: Any) -> None:
        make(plan, *options)
        plan.groups = [group._replace(chain=sorted(group.chain)) for group in plan.groups]

    linear.StatePlan.__init__ = make_in_the_wrong_order


def lse_not_merged(trainer: Trainer) -> None:
    """cp: what is read of further keys is weighted by the first ones alone."""
    attend = ring.attend

    def attend_without_merging(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *more: Any
    ) -> None:
        before = lse.clone()
        attend(q, k, v, out, lse, *more)
        if more[0].mask != "causal":
            lse.copy_(before)

    ring.attend = attend_without_merging


def keys_that_do_not_travel(trainer: Trainer) -> None:
    """cp: a rank sees its own keys again in every step of the ring."""
    _change_results("send", lambda pending: pending.source)


def own_gradients_of_tied_copies(trainer: Trainer) -> None:
    """pp: the two ends of the pipeline each update the embedding with their own gradient."""
    TiedCopy.sum_gradients = lambda tied: None


def _change_results(kind: str, change: Callable[[Pending], Tensor]) -> None:
    """Let what arrives by one kind of collective be something else."""
    wait = Pending.wait

    def wait_and_change(pending: Pending) -> Tensor:
        arrived = wait(pending)
        if pending.kind != kind:
            return arrived
        changed = change(pending)
        return pending.arrange(changed) if pending.arrange else changed

    Pending.wait = wait_and_change


BREAKS: dict[str, Callable[[Trainer], None]] = {
    function.__name__: function
    for function in (
        own_gradients_in_fsdp,
        own_gradients_in_hsdp,
        own_part_of_activations,
        shards_in_the_wrong_order,
        own_gradients_of_replicas,
        rows_of_other_tokens,
        forgotten_halo,
        state_not_reset,
        state_of_the_wrong_block,
        lse_not_merged,
        keys_that_do_not_travel,
        stale_activations,
        stale_gradients,
        own_gradients_of_tied_copies,
    )
}
