"""A model in one of its layouts is asked for predictions; run on ranks by test_sharded.py.

Arguments: a run directory, and the file for what rank 0 found; perhaps `save`, which makes the
run's checkpoint first; the overrides of each layout.
"""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel.mesh import join_ranks
from parallel.offload import OffloadError
from pretrain.checkpoint.trained import load_trained, newest_config, newest_trained
from pretrain.evals.by_position import loss_by_position
from pretrain.evals.forms import TokenForm
from pretrain.evals.long import ask
from pretrain.evals.request import Request, prepared
from pretrain.evals.sharded import ShardedModel
from pretrain.model.kernels.documents import Documents
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

ROWS, LENGTH, VOCABULARY = 3, 128, 64
# The shorter one is a single segment.
LENGTHS = (64, LENGTH)
IGNORED = -100
REQUEST = Request(lengths=LENGTHS, samples=3, pairs=2, values=2)


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(VOCABULARY, size=(ROWS, LENGTH))
    labels = random.integers(VOCABULARY, size=(ROWS, LENGTH))
    labels[random.random(labels.shape) < 0.5] = IGNORED
    position = np.tile(np.concatenate([np.arange(5), np.arange(80), np.arange(43)]), (ROWS, 1))
    return {"tokens": tokens, "labels": labels, "position": position}


def save(run: RunDirectory, device: torch.device) -> dict[str, Any]:
    """Make a checkpoint; what the whole model of it says in one process, from all logits."""
    attempt = run.begin_attempt()
    trainer = Trainer(newest_config(run), run, device, attempt)
    trainer.step(stop_requested=False)
    trainer.store.start_save(trainer.progress, trainer.engine.tensors())
    assert trainer.store.finish_save(is_last=True)

    _, model = load_trained(run)
    asked = {name: torch.from_numpy(x) for name, x in inputs().items()}
    is_label = asked["labels"] != IGNORED
    packed = Documents.from_position(asked["position"])
    cut = Documents.from_lengths([[64, 64]] * ROWS)
    found = {}
    for name, documents in (("whole", None), ("packed", packed), ("cut", cut)):
        with torch.no_grad():
            logits = model(asked["tokens"], documents).value[is_label]
        loss = torch.nn.functional.cross_entropy(
            logits, asked["labels"][is_label], reduction="none"
        )
        found[name] = logits.argmax(-1).numpy(), loss.numpy()
    return found


def answers(run: RunDirectory, overrides: list[str], device: torch.device) -> dict[str, Any]:
    step, trained = newest_trained(run)
    config = prepared(trained, overrides, LENGTHS, dist.get_world_size())
    model = ShardedModel(config, run, step, device)
    asked = inputs()
    whole = model.score(asked["tokens"], asked["labels"])
    packed = model.score(**asked)
    form = TokenForm(VOCABULARY)
    return {
        "whole": (whole.predicted, whole.loss),
        "packed": (packed.predicted, packed.loss),
        "cells": [
            ask(model, form, REQUEST, "overwrite", LENGTH),
            ask(model, form, REQUEST, "needle", LENGTHS[0], 0.5),
        ],
        "buckets": loss_by_position(model, run, replace(REQUEST, shards=config.data.shards)),
    }


def main() -> None:
    directory, results, *layouts = sys.argv[1:]
    device = join_ranks(timedelta(minutes=10))
    run = RunDirectory(Path(directory))
    found: dict[str, Any] = {}
    if layouts[0] == "save":
        found["one process"] = save(run, device)
        layouts = layouts[1:]
    for layout in layouts:
        try:
            found[layout] = answers(run, layout.split(), device)
        except OffloadError as error:
            found[layout] = {"error": str(error)}
    if dist.get_rank() == 0:
        torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
