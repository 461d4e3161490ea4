"""Which layouts a configuration can run on: decided before any process starts, without torch."""

from dataclasses import dataclass
from itertools import product

from pretrain.config import Config
from pretrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes that the ranks are arranged on.

    Experts are folded over dp_shard: `ep` consecutive ranks of it hold all experts between them,
    and each expert is sharded over the remaining dp_shard / ep.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} ep={self.ep}"


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout that `config.parallel` asks for on `world_size` ranks.

    Raises:
        UserError: it does not divide, or a kind of parallelism that farspan cannot do yet; the
            message has the word "layout", the reason, and the nearest layout that works.
    """
    parallel = config.parallel
    for axis in ("pp", "cp", "tp"):
        if getattr(parallel, axis) != 1:
            _refuse(
                config,
                world_size,
                f"parallel.{axis} = {getattr(parallel, axis)}, and farspan spreads a model only "
                "over dp_replicate, dp_shard and ep",
            )
    if world_size % parallel.dp_replicate:
        _refuse(
            config,
            world_size,
            f"parallel.dp_replicate = {parallel.dp_replicate} does not divide the number of "
            f"ranks, {world_size}",
        )
    rest = world_size // parallel.dp_replicate
    dp_shard = rest if parallel.dp_shard == "auto" else parallel.dp_shard
    layout = Layout(parallel.dp_replicate, dp_shard, parallel.ep)
    if layout.world_size != world_size:
        _refuse(
            config,
            world_size,
            f"dp_replicate x dp_shard = {layout.world_size}, but there are {world_size} ranks "
            "(pp, cp and tp are 1; ep needs no ranks of its own)",
        )
    if problem := _problem(config, layout):
        _refuse(config, world_size, problem)
    return layout


def _problem(config: Config, layout: Layout) -> str | None:
    experts, train = config.model.moe.n_experts, config.train
    if layout.ep > 1 and not experts:
        return f"parallel.ep = {layout.ep}, but the model is dense (model.moe.n_experts = 0)"
    if layout.dp_shard % layout.ep:
        return f"parallel.ep = {layout.ep} does not divide dp_shard = {layout.dp_shard}"
    if experts % layout.ep:
        return f"parallel.ep = {layout.ep} does not divide model.moe.n_experts = {experts}"
    expert_shard = layout.dp_shard // layout.ep
    widths = {"d_model": config.model.d_model, "moe.d_expert x 2": 2 * config.model.moe.d_expert}
    for name, width in widths.items():
        if layout.ep > 1 and width % expert_shard:
            return (
                f"dp_shard / ep = {expert_shard} ranks share each expert, and do not divide "
                f"model.{name} = {width}"
            )
    if train.global_batch % (layout.world_size * train.microbatch):
        return (
            f"train.global_batch = {train.global_batch} is no multiple of ranks x "
            f"train.microbatch = {layout.world_size} x {train.microbatch}"
        )
    return None


def _refuse(config: Config, world_size: int, reason: str) -> None:
    message = f"layout refused: {reason}."
    nearest = _nearest(config, world_size)
    if nearest:
        message += f" Nearest that works on {world_size} ranks: {nearest}"
    else:
        step = world_size * config.train.microbatch
        batch = max(step, round(config.train.global_batch / step) * step)
        message += (
            f" No layout works on {world_size} ranks with train.global_batch = "
            f"{config.train.global_batch} and train.microbatch = {config.train.microbatch}; "
            f"nearest batch that does: train.global_batch={batch}"
        )
    raise UserError(message)


def _nearest(config: Config, world_size: int) -> Layout | None:
    """The layout that works and differs least from the one asked for."""
    asked = config.parallel
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    candidates = [
        layout
        for replicate, ep in product(divisors, divisors)
        if _problem(config, layout := Layout(replicate, world_size // replicate, ep)) is None
    ]
    return min(
        candidates,
        key=lambda layout: (
            abs(layout.ep - asked.ep),
            abs(layout.dp_replicate - asked.dp_replicate),
        ),
        default=None,
    )
