"""Which layouts a configuration can run on: decided before any process starts, without torch."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import NoReturn

from parallel.pipeline.plan import problem_of_layers, problem_of_schedule
from pretrain.config import Config, phases_of
from pretrain.errors import UserError
from pretrain.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes that the ranks are arranged on.

    Experts are folded over dp_shard x cp x tp: `ep` consecutive ranks of those hold all experts
    between them, and each expert is sharded over the remaining ones. `ulysses` is a part of `cp`.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    ulysses: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that take different sequences of a global batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of a layer's experts between them."""
        return self.dp_shard * self.cp * self.tp

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in asdict(self).items())


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout that `config.parallel` asks for on `world_size` ranks.

    Raises:
        UserError: it does not divide, or a kind of parallelism that farspan cannot do yet; the
            message has the word "layout", the reason, and the nearest layout that works.
    """
    asked = config.parallel
    others = asked.pp * asked.dp_replicate * asked.cp * asked.tp
    dp_shard = asked.dp_shard
    if dp_shard == "auto":
        if world_size % others:
            _refuse(
                config,
                world_size,
                f"pp x dp_replicate x cp x tp = {others} does not divide the number of ranks, "
                f"{world_size}",
            )
        dp_shard = world_size // others
    layout = Layout(
        pp=asked.pp,
        dp_replicate=asked.dp_replicate,
        dp_shard=dp_shard,
        cp=asked.cp,
        ulysses=asked.ulysses,
        ep=asked.ep,
        tp=asked.tp,
    )
    if layout.world_size != world_size:
        _refuse(
            config,
            world_size,
            f"pp x dp_replicate x dp_shard x cp x tp = {layout.world_size}, but there are "
            f"{world_size} ranks (ep needs no ranks of its own)",
        )
    if problem := _problem(config, layout):
        _refuse(config, world_size, problem)
    if problem := _batch_problem(config, layout):
        wish = _with_batch(config, layout)
        raise UserError(f"layout refused: {problem}. Nearest that works: {wish}")
    return layout


def resolve_layouts(config: Config, world_size: int) -> list[Layout]:
    """The layout of each phase of a run on `world_size` ranks. Raises as `resolve_layout`."""
    phases = phases_of(config)
    layouts = []
    for phase in phases:
        try:
            layouts.append(resolve_layout(phase.config, world_size))
        except UserError as error:
            raise UserError(f"{phase}: {error}" if len(phases) > 1 else str(error)) from None
    return layouts


def _problem(config: Config, layout: Layout) -> str | None:
    """Why the model cannot run on `layout`; None if it can."""
    checks = (_context_problem, _tensor_problem, _expert_problem, _stages_problem)
    return next((problem for check in checks if (problem := check(config, layout))), None)


def _context_problem(config: Config, layout: Layout) -> str | None:
    cp, tp, ulysses = layout.cp, layout.tp, layout.ulysses
    tokens = config.data.seq_len // config.context.segments
    if tokens % (cp * tp):
        of = "data.seq_len"
        if config.context.segments > 1:
            of += " / context.segments"
        return f"cp x tp = {cp} x {tp} does not divide {of} = {tokens}"
    if cp % ulysses:
        return f"parallel.ulysses = {ulysses} does not divide parallel.cp = {cp}"
    attention = config.model.attention
    if ulysses == 1 or set(config.model.layer_kinds()) == {"linear"}:
        return None
    of = "heads of a rank of tp" if tp > 1 else "heads"
    heads, key_heads = attention.n_heads // tp, max(1, attention.n_kv_heads // tp)
    if heads % ulysses:
        return f"parallel.ulysses = {ulysses} does not divide the {heads} {of} (n_heads)"
    if key_heads % ulysses and ulysses % key_heads:
        return (
            f"parallel.ulysses = {ulysses} is neither a divisor nor a multiple of the {key_heads} "
            f"key {of} (n_kv_heads)"
        )
    return None


def _tensor_problem(config: Config, layout: Layout) -> str | None:
    tp = layout.tp
    for name, size in _split_by_tp(config):
        if size % tp:
            return f"parallel.tp = {tp} does not divide {name} = {size}"
    for name, heads in _key_heads(config.model):
        if heads % tp and tp % heads:
            return f"parallel.tp = {tp} is neither a divisor nor a multiple of {name} = {heads}"
    return None


def _split_by_tp(config: Config) -> Iterator[tuple[str, int]]:
    model, kinds = config.model, set(config.model.layer_kinds())
    yield "model.vocab_size", model.vocab_size
    if kinds != {"linear"}:
        yield "model.attention.n_heads", model.attention.n_heads
    if "linear" in kinds:
        yield "model.linear.n_value_heads", model.linear.n_value_heads
    if not model.moe.n_experts:
        yield "model.d_ff", model.d_ff
    elif model.moe.d_shared_expert:
        yield "model.moe.d_shared_expert", model.moe.d_shared_expert


def _key_heads(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """The heads that ranks hold copies of where there are fewer than ranks."""
    kinds = set(model.layer_kinds())
    if kinds != {"linear"}:
        yield "model.attention.n_kv_heads", model.attention.n_kv_heads
    if "linear" in kinds:
        yield "model.linear.n_key_heads", model.linear.n_key_heads


def _expert_problem(config: Config, layout: Layout) -> str | None:
    moe, ep, ranks = config.model.moe, layout.ep, layout.expert_ranks
    if ep > 1 and not moe.n_experts:
        return f"parallel.ep = {ep}, but the model is dense (model.moe.n_experts = 0)"
    if ranks % ep:
        return f"parallel.ep = {ep} does not divide dp_shard x cp x tp = {ranks}"
    if moe.n_experts % ep:
        return f"parallel.ep = {ep} does not divide model.moe.n_experts = {moe.n_experts}"
    shards = ranks // ep
    widths = {"d_model": config.model.d_model, "moe.d_expert x 2": 2 * moe.d_expert}
    for name, width in widths.items():
        if moe.n_experts and (ep > 1 or layout.tp > 1) and width % shards:
            return (
                f"dp_shard x cp x tp / ep = {shards} ranks share each expert, and do not divide "
                f"model.{name} = {width}"
            )
    return None


def _stages_problem(config: Config, layout: Layout) -> str | None:
    if layout.pp == 1:
        return None
    stages = layout.pp * stages_per_rank(config)
    asked = config.parallel.pipeline
    # With two microbatches per rank, what is left to refuse is not their number.
    return problem_of_schedule(
        asked.schedule, layout.pp, stages_per_rank(config), 2 * layout.pp
    ) or problem_of_layers(asked.layers_per_stage, config.model.n_layers, stages)


def stages_per_rank(config: Config) -> int:
    """Pipeline stages of each rank, where there is a pipeline."""
    asked = config.parallel.pipeline
    if asked.stages_per_rank == "auto":
        return 1 if asked.schedule in ("gpipe", "1f1b") else 2
    return asked.stages_per_rank


def _batch_problem(config: Config, layout: Layout) -> str | None:
    train = config.train
    microbatches, rest = divmod(train.global_batch, layout.data_ranks * train.microbatch)
    if rest:
        return (
            f"train.global_batch = {train.global_batch} is no multiple of dp_replicate x dp_shard "
            f"x train.microbatch = {layout.data_ranks} x {train.microbatch}"
        )
    return _microbatches_problem(config, layout, microbatches)


def _microbatches_problem(config: Config, layout: Layout, microbatches: int) -> str | None:
    if config.optim.in_backward and microbatches > 1:
        return (
            "optim.in_backward updates a weight by the gradient of one microbatch of each rank, "
            f"and train.microbatch = {config.train.microbatch} makes {microbatches} of them"
        )
    schedule = config.parallel.pipeline.schedule
    return problem_of_schedule(schedule, layout.pp, stages_per_rank(config), microbatches)


def _refuse(config: Config, world_size: int, reason: str) -> NoReturn:
    wish = _with_batch(config, _nearest(config, world_size))
    raise UserError(f"layout refused: {reason}. Nearest that works on {world_size} ranks: {wish}")


def _with_batch(config: Config, layout: Layout) -> str:
    """`layout`, with the nearest global batch that it can run where that differs."""
    if not _batch_problem(config, layout):
        return str(layout)
    step = layout.data_ranks * config.train.microbatch
    asked = config.train.global_batch / step
    enough = math.ceil(asked) + 2 * layout.pp
    works = (n for n in range(1, enough + 1) if not _microbatches_problem(config, layout, n))
    nearest = min(works, key=lambda n: abs(n - asked))
    return f"{layout} with train.global_batch={nearest * step}"


def _nearest(config: Config, world_size: int) -> Layout:
    """The layout that works and differs least from what was asked for, first in pp, cp, ep, tp."""

    def distance(layout: Layout) -> float:
        asked = config.parallel
        weight = {"pp": 2, "cp": 2, "ep": 2, "tp": 2, "ulysses": 1, "dp_replicate": 1}
        if asked.dp_shard != "auto":
            weight["dp_shard"] = 1
        return sum(
            factor * abs(math.log2(getattr(layout, axis) / getattr(asked, axis)))
            for axis, factor in weight.items()
        )

    working = [
        layout
        for layout in _layouts(world_size, config.parallel.ulysses)
        if _problem(config, layout) is None
    ]
    with_this_batch = [layout for layout in working if _batch_problem(config, layout) is None]
    return min(with_this_batch or working, key=distance)


def _layouts(world_size: int, ulysses: int) -> Iterator[Layout]:
    """All arrangements of `world_size` ranks, with so much Ulysses, or none or all of cp."""

    def divisors(n: int) -> list[int]:
        return [divisor for divisor in all_divisors if n % divisor == 0]

    all_divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for pp in all_divisors:
        for replicate in divisors(world_size // pp):
            ranks = world_size // (pp * replicate)
            for tp, ep in product(divisors(ranks), repeat=2):
                for cp in divisors(ranks // tp):
                    sizes = {"pp": pp, "dp_replicate": replicate, "cp": cp, "ep": ep, "tp": tp}
                    for heads in {1, ulysses, cp} if cp > 1 else {1}:
                        yield Layout(dp_shard=ranks // (tp * cp), ulysses=heads, **sizes)
