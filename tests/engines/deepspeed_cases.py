"""Three steps of farspan's models on ZeRO, on N ranks.

A case is named by its stage, and by what else it does: zero2-offload, zero3-resumed. It saves after
its second step, and `resumed` goes on from there with an engine that has other weights.
"""

import re
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_pipeline.stream import Batch
from pretrain.checkpoint.hf import config_to_hf
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.deepspeed.engine import DeepSpeedEngine
from pretrain.engines.zero_limits import ZeroConfig
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.schedule import learning_rate
from tests.oracle.cases import STEPS, run_cases
from tests.ranks import ROOT

CHECKPOINTS = Path(sys.argv[2]) / "checkpoints"
SAVED_STEP = 2


def documented() -> dict[str, Any]:
    """The functions of docs/deepspeed.md."""
    functions: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/deepspeed.md").read_text(), re.S):
        exec(block, functions)
    return functions


DOCUMENTED = documented()


def read_batches(engine: DeepSpeedEngine) -> list[Batch]:
    """This data rank's rows of the first global batches."""
    stream, size = open_stream(engine.config), engine.config.train.global_batch
    share = size // engine.data_ranks
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    return [stream.read(stream.next_batch(size), mine) for _ in range(STEPS)]


def run_steps(
    engine: DeepSpeedEngine, batches: list[Batch], first: int = 0, saves: Path | None = None
) -> dict[str, Any]:
    train, losses, norms, gradients = engine.config.train, [], [], {}
    saved: dict[str, Any] = {}
    for step, batch in enumerate(batches[first:], first):
        loss, _ = engine.backward(batch)
        losses.append(loss)
        if step == 0:
            gradients = engine.gradients()
        lr = learning_rate(step, train.steps, engine.config.optim.lr, engine.config.schedule)
        norms.append(engine.update(lr))
        if saves is not None and step + 1 == SAVED_STEP:
            engine.save(saves)
            saved = engine.weights()
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": engine.weights(),
        "saved": saved,
        "routers": engine.routers.state_dict(),
        "frequencies": [layer.moe.frequencies for layer in engine.layers.values() if layer.moe],
    }


def zero_of(name: str) -> ZeroConfig:
    stage, offload = int(name.removeprefix("zero")[0]), "offload" in name
    return ZeroConfig(
        stage,
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
        # By default all weights of a small model would stay whole on every rank.
        persistence_threshold=0,
    )


def run_case(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    if name.endswith("transformers"):
        return save_of_transformers(config, CHECKPOINTS / name)
    layout = resolve_layout(config, dist.get_world_size())
    if name.endswith("loaded"):
        engine = DOCUMENTED["build_engine"](config, layout, device)
    else:
        engine = DeepSpeedEngine(config, layout, device, zero_of(name))
    result = run_engine(name, engine)
    engine.close()
    return result


def run_engine(name: str, engine: DeepSpeedEngine) -> dict[str, Any]:
    batches, first_weights = read_batches(engine), engine.weights()
    if name.endswith(("resumed", "universal")):
        # What comes from the checkpoint was not there before.
        engine.load_weights({weight: -value for weight, value in first_weights.items()})
        engine.load(CHECKPOINTS / name.removesuffix("-resumed"))
        return run_steps(engine, batches, first=SAVED_STEP)
    if name.endswith("loaded"):
        engine.load_weights(DOCUMENTED["weights_of"](CHECKPOINTS / "zero1", engine.config.model))
        loss, _ = engine.backward(batches[SAVED_STEP])
        return {"losses": [loss], "weights": engine.weights(), "refused": refusal(engine)}
    result = run_steps(engine, batches, saves=CHECKPOINTS / name)
    engine.load(CHECKPOINTS / name)
    again = run_steps(engine, batches, first=SAVED_STEP)
    return {"first_weights": first_weights, **result, "again": again["losses"]}


def refusal(engine: DeepSpeedEngine) -> str:
    try:
        engine.load(CHECKPOINTS / "zero1")
    except UserError as error:
        return str(error)
    return "loaded"


def save_of_transformers(config: Config, directory: Path) -> dict[str, Any]:
    """A checkpoint as users of transformers and ZeRO 3 have it."""
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config.from_dict(config_to_hf(config.model)))
    tokens = torch.arange(2 * 16).view(2, 16)
    with torch.no_grad():
        logits = theirs(tokens).logits.clone()
    engine, *_ = deepspeed.initialize(
        model=theirs,
        model_parameters=theirs.parameters(),
        optimizer=torch.optim.AdamW(theirs.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.save_checkpoint(str(directory))
    return {"tokens": tokens, "logits": logits}


if __name__ == "__main__":
    run_cases(run_case)
