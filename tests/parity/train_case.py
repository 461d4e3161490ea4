"""Train layouts of models for a few steps and keep all that must be equal; run by matrix.py.

The argument is a list of cases, as JSON.
"""

import json
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import join_ranks
from pretrain.config import Config, load_config
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.parity.broken import BREAKS
from tests.parity.routing import Routing

STEPS_TO_WEIGHTS = 3


@dataclass
class Case:
    """What ranks are asked to do.

    Attributes:
        overrides: of the recipe `tiny-hybrid-moe`.
        steps: of the optimizer.
        results: the folder where rank N leaves what `train_case` returned, as rank-N.pt.
        routing: `record` the experts that are chosen, or the results of one rank that did, to
            choose the same.
        breaks: what is deliberately wrong, a name in `broken.BREAKS`.
    """

    overrides: list[str]
    steps: int
    results: str
    routing: str | None = None
    breaks: str | None = None


def main() -> None:
    device = join_ranks(timedelta(minutes=10))
    for case in (Case(**fields) for fields in json.loads(sys.argv[1])):
        # The last line before a failure.
        print(*case.overrides, flush=True)
        torch.save(train_case(case, device), Path(case.results) / f"rank-{os.environ['RANK']}.pt")
    dist.destroy_process_group()


def train_case(case: Case, device: torch.device) -> dict[str, Any]:
    config = load_config("tiny-hybrid-moe", [*case.overrides, f"train.steps={case.steps}"])
    routing = intercept_routing(config, case.routing) if case.routing else None
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    if routing:
        routing.follow(trainer)
    if case.breaks:
        BREAKS[case.breaks](trainer)

    measures = ("loss", "aux_loss", "z_loss", "router_entropy", "loss_tokens")
    norms = ("grad_norm", "grad_norms", "weight_norms")
    series: dict[str, list[Any]] = {name: [] for name in (*measures, *norms)}
    documents: list[int] = []
    out: dict[str, Any] = {"series": series, "documents": documents}
    for step in range(1, case.steps + 1):
        if routing:
            routing.next_step()
        batch = trainer.read_batch()
        documents.append(int((batch.position == 0).sum()))
        measured, _ = trainer.backward(batch)
        if step == 1:
            out["gradients"] = gradients(trainer.engine.weights)
        for name in measures:
            series[name].append(getattr(measured, name))
        lr = trainer.lr()
        norms, _ = trainer.finish_step(measured)
        series["grad_norm"].append(norms.whole)
        series["grad_norms"].append(norms.parts)
        changed = trainer.engine.weight_and_update_norms(lr)
        of_weights, out["update_norms"] = changed.parts.tolist()
        series["weight_norms"].append(of_weights)
        if step == STEPS_TO_WEIGHTS:
            weights = trainer.engine.weights.named_parameters()
            out["weights"] = {name: whole(weight) for name, weight in weights}
    moments = [x for state in trainer.engine.optimizer.state.values() for x in state.values()]
    out["dtypes"] = {weight.dtype for weight in [*trainer.engine.weights.parameters(), *moments]}
    out["calls"] = {
        axis: dict(comm.calls) for axis, comm in trainer.engine.parallelised.traffic.items()
    }
    if routing:
        out["routing"] = routing.indices
    return out


def intercept_routing(config: Config, source: str) -> Routing:
    recording = None
    if source != "record":
        recording = torch.load(Path(source) / "rank-0.pt")["routing"]
    routing = Routing(config, recording)
    routing.intercept()
    return routing


def gradients(weights: torch.nn.Module) -> dict[str, Tensor]:
    named = weights.named_parameters()
    return {name: whole(weight.grad) for name, weight in named if weight.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


if __name__ == "__main__":
    main()
