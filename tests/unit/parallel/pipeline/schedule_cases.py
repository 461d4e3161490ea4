"""Every schedule over two ranks against one rank; run on 2 ranks by test_schedule.py.

Argument: the file for what rank 0 found.
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from parallel.mesh import join_ranks
from parallel.pipeline.plan import Action, split_layers, stages_of_rank
from parallel.pipeline.schedule import Pipeline, PipelineShape, SingleStage

PP, N_LAYERS, D, VOCAB = 2, 6, 8, 16
MICROBATCHES, ROWS, LENGTH = 6, 2, 4

# name -> schedule, stages per rank, what differs from the plain case.
CASES: dict[str, tuple[Any, int, set[str]]] = {
    "gpipe": ("gpipe", 1, {"fsdp"}),
    "1f1b": ("1f1b", 1, {"fsdp"}),
    "1f1b, uneven": ("1f1b", 1, {"empty ends"}),
    "interleaved": ("interleaved", 3, {"fsdp"}),
    "zbv": ("zbv", 2, {"fsdp"}),
    "zbv, bf16": ("zbv", 2, {"fsdp", "bf16"}),
    "zbv, recompute": ("zbv", 2, {"fsdp", "recompute"}),
    "dualpipev": ("dualpipev", 2, {"fsdp"}),
    "dualpipev, recompute": ("dualpipev", 2, {"recompute"}),
}


class ScaledBy(torch.autograd.Function):
    """x * weight: the gradients of both come from one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad[0] * weight, (grad[0] * x).sum((0, 1))


class AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad[0], torch.ones_like(ctx.saved_tensors[0])


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, D))
        self.gate = nn.Linear(D, 2)
        self.number = number
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        h = ScaledBy.apply(self.linear(x), self.scale)
        probability = self.gate(x).softmax(-1)
        x = x + torch.tanh(h) * probability[..., :1] / (1 + labels[..., None] % LENGTH).to(x.dtype)
        return x, probability[..., 1].float().sum() * (self.number + 1) / 100


class Model(nn.Module):
    """The same on every rank and in every case."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB, D)
            self.blocks = nn.ModuleDict({str(n): Block(n) for n in range(N_LAYERS)})
            self.head = nn.Linear(D, VOCAB)


class ToyStage(nn.Module):
    def __init__(self, index: int, n_stages: int, layers: range, options: set[str]) -> None:
        super().__init__()
        model = Model()
        self.index, self.is_first, self.is_last = index, index == 0, index == n_stages - 1
        self.embedding = model.embedding if self.is_first else None
        self.blocks = nn.ModuleDict({str(n): model.blocks[str(n)] for n in layers})
        self.head = model.head if self.is_last else None
        self.recompute = "recompute" in options
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.embedding is not None:
            x = self.embedding(x)
        loss = torch.zeros(())
        for block in self.blocks.values():
            if self.recompute:
                x, of_block = checkpoint(block, x, labels, use_reentrant=False)
            else:
                x, of_block = block(x, labels)
            loss = loss + of_block
        if self.head is not None:
            logits = self.head(x).float()
            x = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return AttachLoss.apply(x, loss)


def shard(stage: ToyStage, options: set[str]) -> ToyStage:
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh("cpu", (PP, 1), mesh_dim_names=("pp", "fsdp"))["fsdp"]
    for unit in [*stage.blocks.values(), stage]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return stage


def gradients(stages: list[ToyStage]) -> dict[str, Tensor]:
    named = [item for stage in stages for item in stage.named_parameters()]
    missing = [name for name, weight in named if weight.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: local(weight.grad) for name, weight in named}


def local(gradient: Any) -> Tensor:
    return (gradient.to_local() if isinstance(gradient, DTensor) else gradient).clone()


def record(pipeline: Pipeline) -> list[Action]:
    """Fills up with what the stages compute while the pipeline runs."""
    actions: list[Action] = []

    def recorded(stage: Any, method: str, kind: Callable[[dict[str, Any]], Any]) -> None:
        compute = getattr(stage, method)

        def wrapper(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            actions.append(Action(kind(kwargs), stage.stage_index, microbatch))
            return compute(microbatch, *args, **kwargs)

        setattr(stage, method, wrapper)

    for stage in pipeline.stages:
        recorded(stage, "forward_one_chunk", lambda _: "forward")
        recorded(
            stage,
            "backward_one_chunk",
            lambda kwargs: "backward" if kwargs.get("full_backward", True) else "input",
        )
        recorded(stage, "backward_weight_one_chunk", lambda _: "weight")
    return actions


def run_case(
    name: str, batch: list[Tensor], reference: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    schedule, per_rank, options = CASES[name]
    n_stages = PP * per_rank
    layers = split_layers([1.0] * N_LAYERS, n_stages)
    if "empty ends" in options:
        layers = [range(0), range(N_LAYERS)]
    stages = [
        ToyStage(index, n_stages, layers[index], options)
        for index in stages_of_rank(schedule, PP, dist.get_rank(), per_rank)
    ]
    if "fsdp" in options:
        stages = [shard(stage, options) for stage in stages]
    shape = PipelineShape(
        schedule=schedule,
        n_stages=n_stages,
        n_microbatches=MICROBATCHES,
        tokens=(ROWS, LENGTH),
        hidden=(ROWS, LENGTH, D),
        dtype=torch.bfloat16 if "bf16" in options else torch.float32,
        splits_backward="recompute" not in options,
    )
    pipeline = Pipeline(stages, dist.group.WORLD, shape, device)
    actions = record(pipeline)
    began = time.perf_counter()
    for _ in range(2):  # the gradients of two steps add up
        pipeline.forward_backward(*batch)
    seconds = time.perf_counter() - began
    errors = {
        weight: float((gradient / 2 - reference[weight]).norm() / reference[weight].norm())
        for weight, gradient in gradients(stages).items()
    }
    performed = actions[: len(actions) // 2]
    if not pipeline.shape.splits_backward:
        performed = [
            action._replace(kind="backward") if action.kind == "input" else action
            for action in performed
            if action.kind != "weight"
        ]
    return {
        "error": max(errors.values()),
        "stage_calls": [stage.calls for stage in stages],
        "block_calls": [block.calls for stage in stages for block in stage.blocks.values()],
        "order_is_as_told": performed == pipeline.order(),
        "predicted_bubble": pipeline.predicted_bubble,
        "busy_share": pipeline.busy.take() / seconds,
    }


def main() -> None:
    device = join_ranks(timedelta(seconds=60))
    generator = torch.Generator().manual_seed(1)
    shape = (MICROBATCHES * ROWS, LENGTH)
    tokens, labels = (torch.randint(0, VOCAB, shape, generator=generator) for _ in range(2))
    batch = [tokens, labels]

    whole = ToyStage(0, 1, range(N_LAYERS), set())
    SingleStage(whole, MICROBATCHES * ROWS).forward_backward(*batch)
    reference = gradients([whole])

    found = {}
    for name in CASES:
        results: list[Any] = [None] * PP
        dist.all_gather_object(results, run_case(name, batch, reference, device))
        found[name] = results
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
