"""Distributed checkpoints of megatron-core (`torch_dist`), of any layout."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.formats.weights import Weights
from pretrain.config import Config, EvalConfig, OptimConfig
from pretrain.context_config import ContextConfig
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.parallel_config import ParallelConfig

# Which of the folders beside it is the newest, by Megatron-LM.
LATEST = "latest_checkpointed_iteration.txt"
METADATA = "metadata.json"
KNOWN_BY = f"{METADATA} of torch_dist, or {LATEST}"


def is_in(folder: Path) -> bool:
    return (folder / METADATA).is_file() or (folder / LATEST).is_file()


def read(folder: Path, config: Config) -> Weights:
    from pretrain.engines.megatron.checkpoint import load_model

    folder = _of_newest(folder)
    with _engine(config) as engine:
        load_model(engine, folder)
        return Weights(engine.weights())


def write(config: Config, weights: Weights, tokenizer: Path, out: Path) -> None:
    from pretrain.engines.megatron.checkpoint import save_model

    if config.model.moe.balance == "bias":
        _refuse_selection_bias(weights.selection_bias)
    with _engine(config) as engine:
        engine.load_weights(weights.state)
        save_model(engine, out)
    shutil.copyfile(tokenizer, out / "tokenizer.json")


@contextmanager
def _engine(config: Config) -> Iterator[Any]:
    """The model of a configuration in megatron-core, on this rank alone, in float32."""
    from pretrain.engines.megatron.engine import MegatronEngine

    # What megatron-core cannot train with it can store.
    moe = dataclasses.replace(config.model.moe, balance="batch", capacity_factor=None)
    alone = config.model_copy(
        update={
            "model": dataclasses.replace(config.model, moe=moe),
            "train": config.train.model_copy(update={"dtype": "float32", "engine": "megatron"}),
            "parallel": ParallelConfig(),
            "context": ContextConfig(),
            "optim": OptimConfig(),
            "eval": EvalConfig(),
        }
    )
    engine = MegatronEngine(alone, resolve_layout(alone, 1), torch.device("cpu"))
    try:
        yield engine
    finally:
        engine.close()


def _of_newest(folder: Path) -> Path:
    latest = folder / LATEST
    if not latest.is_file():
        return folder
    step = latest.read_text().strip()
    named = folder / (f"iter_{int(step):07d}" if step.isdigit() else step)
    if not (named / METADATA).is_file():
        raise UserError(
            f"{latest} names {named}, which has no {METADATA}: only distributed checkpoints are "
            "read, those of --ckpt-format torch_dist"
        )
    return named


def _refuse_selection_bias(bias: Tensor | None) -> None:
    if bias is not None and bias.any():
        raise UserError(
            "the routers choose experts by a selection bias (model.moe.balance = bias; its size is "
            f"up to {bias.abs().max().item():.3g}), which the layers that are written for "
            "megatron-core do not have: the exported model would choose others. A model trained "
            "with model.moe.balance=batch or sequence exports exactly"
        )
