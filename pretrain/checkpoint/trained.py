"""A trained model: whole in one process, for generation and export, or spread over ranks."""

import sys
from functools import partial

from torch import nn

from pretrain.balancing import RouterState
from pretrain.checkpoint.contents import of_routers, of_weights
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.manifest import Manifest, read_index
from pretrain.checkpoint.reader import read_tensors, refuse_another_model
from pretrain.checkpoint.store import (
    CheckpointStore,
    Retention,
    check_together,
    checkpoint_in,
    newest_whole,
    on_rank_0,
    saved_steps,
)
from pretrain.checkpoint.target import Target
from pretrain.config import Config, phases_of, read_run_config
from pretrain.curriculum import phase_of_checkpoint
from pretrain.errors import UserError
from pretrain.model.transformer import Transformer
from pretrain.run_dir import RunDirectory


def checkpoints_of(config: Config, run: RunDirectory) -> Target:
    """Where the checkpoints of a run lie."""
    return Target(config.checkpoint.dir or str(run.checkpoints))


def newest_config(run: RunDirectory) -> Config:
    """The configuration that the newest checkpoint, whole or not, was trained with; before the
    first, the run's first one. Raises UserError: not a run directory.
    """
    config = read_run_config(run)
    return _config_at(config, max(saved_steps(checkpoints_of(config, run)), default=0))


def newest_trained(run: RunDirectory) -> tuple[int, Config]:
    """The step of the newest whole checkpoint, and the configuration of the phase that it was
    trained in last. Collective.

    All ranks have those that rank 0 finds: a run that goes on may save meanwhile.

    Raises:
        UserError: not a run directory, or no checkpoint yet.
    """
    config = on_rank_0(lambda: read_run_config(run))
    target = checkpoints_of(config, run)
    found = newest_whole(target, on_rank_0(lambda: saved_steps(target)), check_together)
    if found is None:
        raise _no_checkpoint(run, config)
    step, _ = found
    return step, _config_at(config, step)


def require_checkpoint(run: RunDirectory) -> None:
    """Raise UserError if this is not a run directory, or it has no checkpoint yet, whole or not."""
    config = read_run_config(run)
    if not saved_steps(checkpoints_of(config, run)):
        raise _no_checkpoint(run, config)


def load_trained(run: RunDirectory, step: int | None = None) -> tuple[Config, Transformer]:
    """The model of a checkpoint, in float32 on the CPU, and the configuration of the phase that it
    was trained in last.

    Args:
        step: of the checkpoint; None is the newest whole one.

    Raises:
        UserError: not a run directory, no checkpoint yet, or that of `step` is not whole.
    """
    _, config, model = _load(run, step)
    return config, model


def load_newest(run: RunDirectory) -> tuple[int, Config, Transformer]:
    """The step of the newest whole checkpoint, and what `load_trained` gives of it."""
    return _load(run, None)


def _load(run: RunDirectory, step: int | None) -> tuple[int, Config, Transformer]:
    config = read_run_config(run)
    target = checkpoints_of(config, run)
    found = newest_whole(target, saved_steps(target) if step is None else [step])
    if found is None:
        raise _no_checkpoint(run, config)
    step, manifest = found
    config = _config_at(config, step)
    model = Transformer(config.model)
    load_weights(model, checkpoint_in(target, step), manifest)
    print(f"loaded step {step} of {run.root}", file=sys.stderr)
    return step, config, model.eval()


def load_sharded(
    run: RunDirectory, config: Config, step: int, weights: nn.Module, routers: RouterState
) -> None:
    """Fill weights, laid out over the ranks in any way, and the routers' state. Collective.

    Args:
        step: of the checkpoint.

    Raises:
        UserError: it is not whole any more, or it is one of another model.
    """
    target, check = checkpoints_of(config, run), partial(run.check_attempt, 0)
    store = CheckpointStore(target, Retention(config.checkpoint.keep), 0, check)
    wanted = {**of_weights(weights), **of_routers(routers.state_dict())}
    progress = store.load(lambda index: wanted, up_to=step)
    if progress is None or progress.step != step:
        raise UserError(
            f"the checkpoint of step {step} in {target} was whole a moment ago and is not any more"
            ": a run that goes on removes old ones (checkpoint.keep). Start the command again"
        )


def _config_at(config: Config, step: int) -> Config:
    """Of the phase that a checkpoint was trained in last."""
    return phase_of_checkpoint(phases_of(config), step).config


def _no_checkpoint(run: RunDirectory, config: Config) -> UserError:
    return UserError(
        f"{run.root} has no checkpoint yet; train to step {config.checkpoint.every} at least "
        "(checkpoint.every)"
    )


def load_weights(model: Transformer, checkpoint: Target, manifest: Manifest) -> None:
    """Fill a plain model with the weights of a checkpoint, whatever layout wrote it.

    Its routers choose as those that were trained.
    """
    routers = RouterState(model.config.n_layers, model.config.moe)
    tensors = {**of_weights(model), **of_routers(routers.state_dict())}
    index = Index.from_bytes(read_index(checkpoint, manifest))
    refuse_another_model(checkpoint, index, tensors)
    read_tensors(checkpoint, index, tensors)
    routers.copy_to(dict(model.layers))
