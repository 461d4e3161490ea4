"""Checkpoints of DeepSpeed's ZeRO, of any stage and number of ranks, and universal ones."""

from pathlib import Path

from pretrain.checkpoint.formats.weights import Weights
from pretrain.config import Config

KNOWN_BY = "the file latest, *_optim_states.pt, or the folder zero of a universal checkpoint"


def is_in(folder: Path) -> bool:
    is_step = (folder / "zero").is_dir() or any(folder.glob("*_optim_states.pt"))
    return is_step or (folder / "latest").is_file()


def read(folder: Path, config: Config) -> Weights:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    found = import_checkpoint(folder, config.model)
    return Weights(found.weights, found.selection_bias)
