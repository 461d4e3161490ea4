"""Measure real steps of training as a dry run does fake ones; run on 4 ranks by test_dry_run.py.

Arguments: the shards, the folder for results, the cases as `name:key=value key=value`.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.stream import Batch
from parallel.fsdp import local_tensor
from pretrain.config import load_config
from pretrain.dry_run.assumptions import gpu_kernels
from pretrain.dry_run.plan import axis_names
from pretrain.dry_run.step import Step
from pretrain.dry_run.tracker import StepTracker
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.rank_cases import run_cases

STEPS = 4


def whole_rows(trainer: Trainer) -> Batch:
    """Random tokens; every row is one document, or with lanes a part of one that goes on."""
    train, model, data = trainer.config.train, trainer.config.model, trainer.config.data
    shape = (train.global_batch // trainer.engine.mesh.data_ranks, data.seq_len)
    draw = np.random.default_rng(trainer.engine.mesh.data_rank)
    tokens, labels = draw.integers(0, model.vocab_size, (2, *shape))
    position = np.broadcast_to(np.arange(data.seq_len), shape).copy()
    goes_on = np.ones(shape[0], bool)
    return Batch(tokens, labels, position, np.zeros_like(tokens), goes_on, goes_on)


def sent_by_communicators(trainer: Trainer) -> dict[tuple[str, str], int]:
    """(axis, kind) -> bytes that have been sent so far, as ranks count them."""
    sent = trainer.engine.parallelised.sent_bytes()
    return {(axis, kind.replace("_", "-")): n_bytes for (axis, kind), n_bytes in sent.items()}


def run_case(shards: Path, overrides: list[str], device: torch.device) -> dict[str, Any]:
    config = load_config("tiny-hybrid-moe", [f"data.shards={shards}", *overrides])
    with gpu_kernels(), StepTracker({}) as tracker:
        trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
        tracker.axes = axis_names(trainer.engine.mesh)
        step = Step(
            config, trainer.layout, trainer.engine.mesh, trainer.engine.parallelised, tracker
        )
        batch = whole_rows(trainer)
        measurements = []
        for _ in range(STEPS):
            tracker.reset()
            counted = Counter(sent_by_communicators(trainer))
            measured, _ = trainer.backward(batch)
            gradients = [w.grad for w in trainer.engine.weights.parameters()]
            gradient_bytes = sum(local_tensor(gradient).nbytes for gradient in gradients)
            del gradients
            trainer.finish_step(measured)
            sent = Counter(sent_by_communicators(trainer))
            sent.subtract(counted)
            memory = step.activations_at_peak(step.microbatches), tracker.peak
            measurements.append((*memory, tracker.gathered_at_peak))
    # The optimizer's state is there from the second step on. A thread of gloo may still hold a
    # tensor that has been sent, which would be counted, too.
    activations, peak, gathered = map(min, zip(*measurements[1:], strict=True))
    moments = [x for state in trainer.engine.optimizer.state.values() for x in state.values()]
    return {
        "parameters": sum(local_tensor(w).numel() for w in trainer.engine.weights.parameters()),
        "optimizer": sum(local_tensor(x).nbytes for x in moments),
        "gradients": gradient_bytes,
        "activations": activations,
        "gathered": gathered,
        "peak": peak,
        "traffic": [[*key, t.calls, t.bytes] for key, t in tracker.traffic.items()],
        "sent": [[*key, n_bytes] for key, n_bytes in sent.items()],
    }


if __name__ == "__main__":
    run_cases(run_case)
