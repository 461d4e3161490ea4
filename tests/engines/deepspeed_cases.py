"""Ten steps of an engine on N ranks, and DeepSpeed's own checkpoints.

A case is named as its results and its checkpoints are. It saves after SAVED_STEP steps; NAME-from-X
goes on from there, from the checkpoint of X: in our format, or if X begins with "their", in
DeepSpeed's.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_pipeline.stream import Batch
from parallel.agreement import check_copies
from pretrain.checkpoint.hf import config_to_hf
from pretrain.checkpoint.store import CheckpointStore, Progress, Retention
from pretrain.checkpoint.target import Target
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.build import build_engine
from pretrain.engines.deepspeed.engine import DeepSpeedEngine
from pretrain.engines.engine import Engine, Measured
from pretrain.engines.native import NativeEngine
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.schedule import learning_rate
from tests.engines.zero_of_transformers import save_under_zero_3
from tests.oracle.cases import run_cases
from tests.oracle.our_cases import whole

CHECKPOINTS = Path(sys.argv[2]) / "checkpoints"
STEPS, SAVED_STEP, STEPS_AGAIN = 10, 3, 3
# Not exact in float32.
NUMBER = 2.0**40


def run_case(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    if name == "transformers":
        return save_of_transformers(config, CHECKPOINTS / name)
    engine = build_engine(config, resolve_layout(config, dist.get_world_size()), device)
    name, _, source = name.partition("-from-")
    batches = read_batches(engine, config)
    if source.startswith("their"):
        result = go_on_from_theirs(engine, config, batches, source)
    elif source:
        load(engine, source)
        result = run_steps(engine, config, batches, first=SAVED_STEP)
    else:
        result = begin(engine, config, batches, name)
    engine.close()
    return result


def read_batches(engine: Engine, config: Config) -> list[Batch]:
    """This data rank's rows of the first global batches."""
    stream, size = open_stream(config), config.train.global_batch
    share = size // engine.data_ranks
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    return [stream.read(stream.next_batch(size), mine) for _ in range(STEPS)]


def begin(engine: Engine, config: Config, batches: list[Batch], name: str) -> dict[str, Any]:
    engine.initialize()
    result = {"first_weights": weights_of(engine)}
    result |= run_steps(engine, config, batches, saves=name)
    if isinstance(engine, DeepSpeedEngine):
        spoil(engine, batches[0])
        load(engine, name)
        result["again"] = run_steps(engine, config, batches, first=SAVED_STEP)
    return result


def run_steps(
    engine: Engine, config: Config, batches: list[Batch], first: int = 0, saves: str = ""
) -> dict[str, Any]:
    """Take the steps from `first` on."""
    found: dict[str, Any] = {"losses": [], "norms": []}
    last = min(first + STEPS_AGAIN, STEPS) if first else STEPS
    for step, batch in enumerate(batches[first:last], first):
        lr = learning_rate(step, config.train.steps, config.optim.lr, config.schedule)
        if step == SAVED_STEP - 1:
            # What is not learned from leaves no trace.
            engine.backward(batches[-1], lr)
            engine.clip()
            engine.discard()
        measured = engine.backward(batch, lr, [NUMBER + dist.get_rank()])
        found["losses"].append(measured.loss)
        if step == 0:
            found["gradients"] = gradients_of(engine)
            found["measured"] = plain(measured)
        found["norms"].append(engine.clip().whole)
        engine.update(measured)
        if saves and step + 1 == SAVED_STEP:
            found["saved"] = weights_of(engine)
            save(engine, saves)
        if step + 1 == SAVED_STEP + STEPS_AGAIN:
            found["weights"] = weights_of(engine)
            found["routers"] = {
                name: value.clone() for name, value in engine.routers.state_dict().items()
            }
    check_copies(engine.copies())
    elements = torch.tensor(sum(part.numel() for _, part in engine.named_weights()))
    dist.all_reduce(elements)
    return {
        **found,
        "stored": int(elements) / sum(weight.numel() for weight in found["weights"].values()),
    }


def plain(measured: Measured) -> dict[str, Any]:
    values = dict(vars(measured))
    for by in ("by_source", "by_position"):
        values[by] = [tuple(part) for part in values[by]]
    return values


def spoil(engine: DeepSpeedEngine, batch: Batch) -> None:
    """Leave NaN and a gradient that nobody has asked for: a checkpoint brings all back."""
    engine.backward(batch, 1.0)
    with torch.no_grad():
        for partition, moments in engine.optimizer.optimizer.state.items():
            for value in (partition, *moments.values()):
                value.fill_(float("nan"))
        for _, part in engine.named_weights():
            part.fill_(float("nan"))


def save(engine: Engine, name: str) -> None:
    store = open_store(name)
    store.start_save(Progress(SAVED_STEP, 0, {}), engine.tensors())
    store.finish_save(is_last=True)
    if isinstance(engine, DeepSpeedEngine):
        engine.save(CHECKPOINTS / f"their-{name}")


def load(engine: Engine, name: str) -> None:
    open_store(name).load(engine.tensors_to_fill)
    engine.take_over()


def open_store(name: str) -> CheckpointStore:
    folder = CHECKPOINTS / name
    folder.mkdir(parents=True, exist_ok=True)
    return CheckpointStore(Target(str(folder)), Retention(1), 0, lambda: None)


def go_on_from_theirs(
    engine: Engine, config: Config, batches: list[Batch], source: str
) -> dict[str, Any]:
    assert isinstance(engine, DeepSpeedEngine)
    engine.initialize()
    try:
        engine.load(CHECKPOINTS / source)
    except UserError as error:
        return {"refused": str(error)}
    return run_steps(engine, config, batches, first=SAVED_STEP)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Whole, in float32, on every rank."""
    if isinstance(engine, NativeEngine):
        return whole(engine.weights.named_parameters())
    assert isinstance(engine, DeepSpeedEngine)
    named = engine.model.named_parameters()
    return {name: safe_get_full_fp32_param(weight).detach().clone() for name, weight in named}


def gradients_of(engine: Engine) -> Mapping[str, Tensor]:
    """Whole, on every rank."""
    if isinstance(engine, NativeEngine):
        weights = engine.weights.named_parameters()
        return whole((name, w.grad) for name, w in weights if w.grad is not None)
    assert isinstance(engine, DeepSpeedEngine)
    named = engine.model.named_parameters()
    return {name: safe_get_full_grad(weight).clone() for name, weight in named}


def save_of_transformers(config: Config, directory: Path) -> dict[str, Any]:
    """A checkpoint as users of transformers and ZeRO 3 have it."""
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config.from_dict(config_to_hf(config.model)))
    tokens = torch.arange(2 * 16).view(2, 16)
    with torch.no_grad():
        logits = theirs(tokens).logits.clone()
    save_under_zero_3(theirs, directory)
    return {"tokens": tokens, "logits": logits}


if __name__ == "__main__":
    run_cases(run_case)
