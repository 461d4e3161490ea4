"""Ten steps of farspan's models under any engine, on any layout of N ranks, saved and gone on from.

What a case saves after SAVED steps lies in a folder of its name: where a case is to go on from
another's, that follows its own name after "<".
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream import Batch
from parallel.agreement import check_copies
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.manifest import index_name
from pretrain.checkpoint.reader import read_tensors
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.target import Target
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.build import build_engine
from pretrain.engines.engine import Engine
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.schedule import learning_rate
from tests.oracle.cases import run_cases

STEPS, SAVED, RESUMED = 10, 3, 6
RESULTS = Path(sys.argv[2])


def read_batches(engine: Engine, config: Config) -> Iterator[Batch]:
    """This data rank's rows of the global batches."""
    stream, size = open_stream(config), config.train.global_batch
    share = size // engine.data_ranks
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    for _ in range(STEPS):
        yield stream.read(stream.next_batch(size), mine)


def run_steps(engine: Engine, config: Config, steps: Iterable[int], folder: str = "") -> list[Any]:
    """What each of the steps measured, and its gradient's norm; saves into the folder if named."""
    found, wanted = [], set(steps)
    for step, batch in enumerate(read_batches(engine, config)):
        if step not in wanted:
            continue
        lr = learning_rate(step, config.train.steps, config.optim.lr, config.schedule)
        measured = engine.backward(batch, lr, [1.0, 0.1])
        norms = engine.clip()
        engine.update(measured)
        found.append({"norm": norms.whole, "norms": norms.parts, **vars(measured)})
        if folder and step + 1 == SAVED:
            save(engine, folder)
    return found


def save(engine: Engine, folder: str) -> None:
    target = Target(str(RESULTS / folder))
    target.make()
    staging = Staging(engine.tensors(), attempt=0)
    staging.copy(engine.tensors())
    staging.write(target)
    dist.barrier()


def load(engine: Engine, folder: str) -> None:
    target = Target(str(RESULTS / folder))
    index = Index.from_bytes((target / index_name(0)).read())
    read_tensors(target, index, engine.tensors_to_fill(index))
    engine.take_over()


def go_on(config: Config, device: torch.device, folder: str) -> list[Any]:
    """The steps after `folder` was saved, in an engine that has not been used."""
    engine = build_engine(config, resolve_layout(config, dist.get_world_size()), device)
    load(engine, folder)
    check_copies(engine.copies())
    found = run_steps(engine, config, range(SAVED, RESUMED))
    engine.close()
    return found


def negate(engine: Any) -> dict[str, Tensor]:
    """Whole weights, after they were taken over."""
    engine.load_weights({weight: -value for weight, value in engine.weights().items()})
    weights: dict[str, Tensor] = engine.weights()
    return weights


def use_their_checkpoints(name: str, engine: Any) -> dict[str, Any]:
    """Whole weights, and what becomes of them in distributed checkpoints of megatron-core."""
    from megatron.core import dist_checkpointing

    from pretrain.engines.megatron.checkpoint import load_model, save_model
    from pretrain.engines.megatron.cpu import on_any_device

    saved, folder = engine.weights(), RESULTS / "torch-dist"
    found = {"saved": saved, "negated": negate(engine)}
    if name == "tp2-ep2":
        engine.load_weights(saved)
        save_model(engine, folder)
    elif name == "pp2-interleaved":
        load_model(engine, folder)
        found["loaded"] = engine.weights()
    else:
        found["refused"] = refused = []
        for wrong in (RESULTS, folder):
            try:
                load_model(engine, wrong)
            except UserError as error:
                refused.append(str(error))
        engine.load_weights(saved)
        # As a user of megatron-core saves it.
        theirs = RESULTS / "stacked"
        theirs.mkdir(exist_ok=True)
        with on_any_device():
            dist_checkpointing.save({"model": engine.models[0].sharded_state_dict()}, str(theirs))
        negate(engine)
        load_model(engine, theirs)
        found["loaded"] = engine.weights()
    return found


def run_case(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    name, _, source = name.partition("<")
    if source:
        return {"steps": go_on(config, device, source)}
    engine: Any = build_engine(config, resolve_layout(config, dist.get_world_size()), device)
    engine.initialize()
    is_theirs = config.train.engine == "megatron"
    found = {"first_weights": engine.weights()} if is_theirs else {}
    found["steps"] = run_steps(engine, config, range(STEPS), name)
    check_copies(engine.copies())
    if name in ("tp2-ep2", "pp2-interleaved", "cp2-softmax"):
        found |= use_their_checkpoints(name, engine)
    engine.close()
    return {**found, "resumed": go_on(config, device, name)}


if __name__ == "__main__":
    run_cases(run_case)
