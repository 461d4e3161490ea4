"""The bubble of a pipeline: plain arithmetic, without torch."""

from collections.abc import Sequence

from parallel.pipeline.plan import Action

# A backward pass computes the gradients of inputs and of weights.
RELATIVE_SECONDS = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}


def predicted_bubble(orders: Sequence[Sequence[Action]]) -> float:
    """The bubble where all stages take equally long, and a backward pass twice a forward pass.

    Without a split backward pass it is (p - 1) / (v m + p - 1) for p ranks, v stages per rank and m
    microbatches (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Args:
        orders: what each rank computes, in its order.
    """
    return replayed_bubble(
        [[(action, RELATIVE_SECONDS[action.kind]) for action in order] for order in orders]
    )


def replayed_bubble(ranks: Sequence[Sequence[tuple[Action, float]]]) -> float:
    """The share of the ranks' time in which they do not compute, from the first computation to the
    last: each rank computes in its order, as soon as what it needs is there, and sending takes no
    time.

    Args:
        ranks: of each, its computations and the seconds that they take.
    """
    last_stage = max(action.stage for rank in ranks for action, _ in rank)
    done: dict[tuple[bool, int, int], float] = {}  # (is forward, stage, microbatch) -> when
    clocks = [0.0] * len(ranks)
    waiting = [list(reversed(rank)) for rank in ranks]
    while any(waiting):
        for rank, computations in enumerate(waiting):
            while computations:
                action, seconds = computations[-1]
                needed = _needed(action, last_stage)
                if needed and needed not in done:
                    break
                ready = done[needed] if needed else 0.0
                clocks[rank] = max(clocks[rank], ready) + seconds
                if action.kind != "weight":
                    done[action.kind == "forward", action.stage, action.microbatch] = clocks[rank]
                computations.pop()
    busy = sum(seconds for rank in ranks for _, seconds in rank)
    return 1 - busy / (len(ranks) * max(clocks))


def _needed(action: Action, last_stage: int) -> tuple[bool, int, int] | None:
    """What has to be done before on another stage, if anything has."""
    is_forward = action.kind == "forward"
    if action.kind == "weight" or action.stage == (0 if is_forward else last_stage):
        return None
    return is_forward, action.stage - 1 if is_forward else action.stage + 1, action.microbatch
