"""A run that begins with the weights of others: its checkpoint of step 0."""

from functools import partial

from pretrain.balancing import RouterState
from pretrain.checkpoint.contents import MODEL, of_routers
from pretrain.checkpoint.formats.weights import Weights
from pretrain.checkpoint.owner import claim, refuse_anothers
from pretrain.checkpoint.store import CheckpointStore, Progress, Retention, saved_steps
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.config import Config, phases_of
from pretrain.data import open_stream
from pretrain.errors import FencedError, UserError
from pretrain.run_dir import RunDirectory

# The files of a checkpoint are named after the attempt that wrote it; those of a run count from 1.
ATTEMPT = 0


def refuse_begun(config: Config, run: RunDirectory) -> None:
    """Raise UserError if a run has been trained, has a checkpoint, or would save where another run
    does.
    """
    target = checkpoints_of(config, run)
    if config.checkpoint.dir is not None:
        refuse_anothers(target, run)
    if steps := saved_steps(target):
        raise UserError(
            f"{target} has a checkpoint of step {steps[-1]} already: the weights of others are "
            "what a run begins with; import them into another --run-dir"
        )
    if attempt := run.current_attempt():
        raise UserError(
            f"{run.root} has begun already, with attempt {attempt}: the weights of others are what "
            "a run begins with; import them into another --run-dir"
        )


def save_beginning(config: Config, run: RunDirectory, weights: Weights) -> None:
    """Save the checkpoint that the first attempt goes on from: no optimizer, no token seen.

    Called with the directory held. Collective, on one rank.

    Raises:
        TrainingError: it cannot be written.
        UserError: another run's checkpoints lie where it would.
    """
    first = phases_of(config)[0].config
    routers = RouterState(config.model.n_layers, config.model.moe)
    if weights.selection_bias is not None:
        routers.selection_bias.copy_(weights.selection_bias)
    tensors = {f"{MODEL}{name}": weight.float() for name, weight in weights.state.items()}
    tensors |= of_routers(routers.state_dict())
    check = partial(_check_not_begun, run)
    target = checkpoints_of(config, run)
    if config.checkpoint.dir is not None:
        claim(target, run, check)
    store = CheckpointStore(target, Retention(1), ATTEMPT, check)
    store.go_on_from(0)
    store.start_save(Progress(0, 0, open_stream(first).state_dict()), tensors)
    store.finish_save(is_last=True)


def _check_not_begun(run: RunDirectory) -> None:
    if attempt := run.current_attempt():
        raise FencedError(f"attempt {attempt} of {run.root} has begun: nothing was imported")
