"""A trained model, whole, in one process: for evaluation, generation and export."""

import sys
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp

from pretrain.balancing import RouterState
from pretrain.checkpoint.store import checkpoint_path, newest_whole, saved_steps
from pretrain.config import Config, read_run_config
from pretrain.errors import UserError
from pretrain.model.transformer import Transformer
from pretrain.run_dir import RunDirectory


def load_trained(run: RunDirectory) -> tuple[Config, Transformer]:
    """The model of the newest whole checkpoint, in float32 on the CPU.

    Raises:
        UserError: not a run directory, or no checkpoint yet.
    """
    config = read_run_config(run)
    step = newest_whole(run.checkpoints, saved_steps(run.checkpoints))
    if step is None:
        raise UserError(
            f"{run.root} has no checkpoint yet; train to step {config.checkpoint.every} at least "
            "(checkpoint.every)"
        )
    model = Transformer(config.model)
    load_weights(model, checkpoint_path(run.checkpoints, step))
    print(f"loaded step {step} of {run.root}", file=sys.stderr)
    return config, model.eval()


def load_weights(model: Transformer, checkpoint: Path) -> None:
    """Fill a plain model with the weights of a checkpoint, whatever layout wrote it.

    Its routers choose as those that were trained.
    """
    routers = RouterState(model.config.n_layers, model.config.moe)
    tensors = {"model": model.state_dict(), "routers": routers.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    routers.copy_to(dict(model.layers))
