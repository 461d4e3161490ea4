"""What the engine of a run cannot do: decided before any process starts, without torch."""

from pretrain.config import Config, phases_of
from pretrain.engines.extra import TESTED, check_extra
from pretrain.engines.limits import check_megatron
from pretrain.engines.zero_limits import check_deepspeed
from pretrain.errors import UserError
from pretrain.layouts import Layout, resolve_layouts
from pretrain.parallel_config import ZeroConfig


def check_engine(config: Config, layout: Layout) -> None:
    """Raise UserError with all that `train.engine` cannot do, of a layout that is one of ours."""
    engine = config.train.engine
    if engine != "deepspeed" and config.parallel.zero != ZeroConfig():
        raise UserError(
            f"parallel.zero with train.engine = {engine}: it is DeepSpeed's alone; "
            "set train.engine=deepspeed, or leave parallel.zero as it is by default"
        )
    if engine == "megatron":
        check_megatron(config, layout)
    elif engine == "deepspeed":
        check_deepspeed(config, layout)


def check_engines(config: Config, world_size: int) -> list[Layout]:
    """The layout of each phase of a run, each of them one that its engine can train.

    Raises:
        UserError: as `resolve_layouts`, or as `check_engine`.
    """
    layouts = resolve_layouts(config, world_size)
    for phase, layout in zip(phases_of(config), layouts, strict=True):
        check_engine(phase.config, layout)
    return layouts


def check_installed(config: Config) -> None:
    """Raise UserError where this machine has not what `train.engine` needs."""
    if (engine := config.train.engine) in TESTED:
        check_extra(engine, TESTED[engine])


def check_is_native(config: Config, what: str) -> None:
    """Raise UserError where another engine trains, of which `what` knows nothing."""
    if config.train.engine != "native":
        raise UserError(
            f"train.engine = {config.train.engine}: {what} knows the native engine alone"
        )
