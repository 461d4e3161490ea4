"""Which stage has which layers and works when: plain arithmetic, without torch."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

Schedule = Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"]


class Action(NamedTuple):
    """One computation of a schedule.

    Attributes:
        kind: `backward` is the whole of it; `input` and `weight` are its halves.
    """

    kind: Literal["forward", "backward", "input", "weight"]
    stage: int
    microbatch: int


def problem_of_schedule(
    schedule: Schedule, pp: int, stages_per_rank: int, n_microbatches: int
) -> str | None:
    """Why `schedule` cannot run, in terms of the configuration; None if it can."""
    if pp == 1:
        return None
    name = f"parallel.pipeline.schedule = {schedule}"
    per_rank = f"parallel.pipeline.stages_per_rank = {stages_per_rank}"
    microbatches = f"{n_microbatches} microbatches per step"
    if schedule in ("gpipe", "1f1b") and stages_per_rank != 1:
        return f"{name} has one stage per rank, but {per_rank} (auto gives what it needs)"
    if schedule in ("zbv", "dualpipev") and stages_per_rank != 2:
        return f"{name} has two stages per rank, but {per_rank} (auto gives what it needs)"
    if schedule == "interleaved" and stages_per_rank < 2:
        return f"{name} needs two stages per rank or more, but {per_rank} (auto gives two)"
    if schedule == "1f1b" and n_microbatches < pp:
        return f"{name} needs a microbatch per rank of pp = {pp}, but there are {microbatches}"
    if schedule == "dualpipev" and n_microbatches < 2 * pp:
        return f"{name} needs a microbatch per stage, 2 x pp = {2 * pp}, but has {microbatches}"
    rounds = max(1, n_microbatches // pp)
    if schedule == "interleaved" and n_microbatches % rounds:
        return (
            f"{name} takes microbatches in {rounds} equal rounds of pp = {pp} or a little more, "
            f"but there are {microbatches}"
        )
    return None


def stages_of_rank(schedule: Schedule, pp: int, pp_rank: int, stages_per_rank: int) -> list[int]:
    """The stages of a rank, in the order of the model: in a V for zbv and dualpipev, else looped.

    In a V the first rank has the first and the last stage.
    """
    n_stages = pp * stages_per_rank
    if schedule in ("zbv", "dualpipev"):
        return [pp_rank, n_stages - 1 - pp_rank]
    return list(range(pp_rank, n_stages, pp))


def problem_of_layers(
    layers_per_stage: Sequence[int] | Literal["balanced"], n_layers: int, n_stages: int
) -> str | None:
    """Why the layers cannot be split that way, in terms of the configuration; None if they can."""
    if layers_per_stage == "balanced":
        if n_layers < n_stages:
            return f"model.n_layers = {n_layers} are fewer than the pipeline's {n_stages} stages"
        return None
    name = f"parallel.pipeline.layers_per_stage = {list(layers_per_stage)}"
    if len(layers_per_stage) != n_stages:
        return (
            f"{name} has {len(layers_per_stage)} entries for {n_stages} stages; balanced needs none"
        )
    if sum(layers_per_stage) != n_layers:
        total = sum(layers_per_stage)
        return f"{name} adds up to {total}, not to model.n_layers = {n_layers}; balanced does"
    if 0 in layers_per_stage[1:-1]:
        return f"{name}: only the first stage (embedding) and the last (head) can have no layer"
    return None


def consecutive(layers_per_stage: Iterable[int]) -> list[range]:
    """Numbers of layers -> the layers of each stage."""
    stops = list(accumulate(layers_per_stage))
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def split_layers(
    costs: Sequence[float], n_stages: int, first: float = 0.0, last: float = 0.0
) -> list[range]:
    """Split layers into consecutive stages of one layer or more, so that the slowest is fastest.

    Of the splits whose largest cost is least, the one with the least sum of squared costs.

    Args:
        costs: of each layer; at least `n_stages` of them.
        first: cost of what the first stage does besides, the embedding.
        last: cost of what the last stage does besides, the head and the loss.
    """
    assert 1 <= n_stages <= len(costs)
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, layers: range) -> float:
        of_ends = first * (stage == 0) + last * (stage == n_stages - 1)
        return before[layers.stop] - before[layers.start] + of_ends

    def squared_within_bound(stage: int, layers: range) -> float:
        of_stage = cost(stage, layers)
        return of_stage**2 if of_stage <= bound else float("inf")

    fastest = _best_split(len(costs), n_stages, cost, max)
    bound = max(cost(stage, layers) for stage, layers in enumerate(fastest))
    return _best_split(len(costs), n_stages, squared_within_bound, lambda a, b: a + b)


def _best_split(
    n_layers: int,
    n_stages: int,
    cost: Callable[[int, range], float],
    combine: Callable[[float, float], float],
) -> list[range]:
    """The split with the least combined cost of its stages, by dynamic programming."""
    # The best split of the first `stop` layers into the stages so far: its cost, its last stage.
    tables: list[dict[int, tuple[float, range]]] = [{0: (0.0, range(0))}]
    for stage in range(n_stages):
        previous, best = tables[-1], {}
        for stop in range(stage + 1, n_layers - (n_stages - stage - 1) + 1):
            splits = (
                (combine(so_far, cost(stage, range(start, stop))), range(start, stop))
                for start, (so_far, _) in previous.items()
                if start < stop
            )
            best[stop] = min(splits, key=lambda split: split[0])
        tables.append(best)
    stages, stop = [], n_layers
    for table in reversed(tables[1:]):
        stages.append(table[stop][1])
        stop = stages[-1].start
    return stages[::-1]


def one_stage_order(schedule: Schedule, pp: int, pp_rank: int, n_microbatches: int) -> list[Action]:
    """What a rank computes in gpipe (Huang et al. 2018, arXiv:1811.06965) or 1f1b.

    1f1b: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1.
    """
    warmup = n_microbatches if schedule == "gpipe" else min(n_microbatches, pp - pp_rank)
    actions = [Action("forward", pp_rank, n) for n in range(warmup)]
    for n in range(n_microbatches):
        actions.append(Action("backward", pp_rank, n))
        if warmup + n < n_microbatches:
            actions.append(Action("forward", pp_rank, warmup + n))
    return actions


def peak_stored(order: Iterable[Action], size: Callable[[int], int]) -> int:
    """The most that the activations of unfinished microbatches take at a time.

    Args:
        order: what a rank computes.
        size: of a stage's activations of one microbatch; `lambda stage: 1` counts them.
    """
    stored = peak = 0
    for action in order:
        if action.kind == "forward":
            stored += size(action.stage)
        peak = max(peak, stored)
        if action.kind in ("backward", "weight"):
            stored -= size(action.stage)
    return peak
