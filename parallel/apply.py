"""How a model is spread over ranks: the one function to read first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.comm import Communicator
from parallel.expert.shard import shard_experts
from parallel.fsdp import shard_weights
from parallel.mesh import Mesh
from parallel.replicas import Replicas, TiedCopy
from parallel.stage import Objective, Stage


@dataclass(frozen=True)
class Spread:
    """How to spread a model, besides the mesh.

    Attributes:
        dtype: of the computation.
        n_stages: of the pipeline, over all its ranks.
        microbatch: sequences of a microbatch.
    """

    dtype: torch.dtype
    n_stages: int = 1
    microbatch: int = 1


@dataclass
class Parallelised:
    """The stages of a model that live on this rank, and what it takes to train them.

    Attributes:
        stages: in the order of the model.
        weights: a module that holds each weight of this rank once, under its name in the model.
        replicas: what completes gradients after the last backward pass of a step.
        traffic: the counted collectives, by axis.
    """

    stages: Sequence[Stage]
    weights: nn.Module
    replicas: Replicas
    microbatch: int
    traffic: dict[str, Communicator] = field(default_factory=dict)

    def forward_backward(
        self, tokens: Tensor, position: Tensor, labels: Tensor, loss_tokens: int
    ) -> None:
        """Leave the gradient of this rank's rows [rows, T] in its weights' `.grad`."""
        for stage in self.stages:
            stage.begin(loss_tokens)
        (stage,) = self.stages
        size = self.microbatch
        rows = zip(tokens.split(size), position.split(size), labels.split(size), strict=True)
        batches = list(rows)
        for batch in batches:
            assert isinstance(stage, FSDPModule)
            stage.set_requires_gradient_sync(batch is batches[-1])
            stage.set_is_last_backward(batch is batches[-1])
            stage(*batch).backward()
        self.replicas.sum_gradients()


def apply(models: Mapping[int, Any], objective: Objective, mesh: Mesh, how: Spread) -> Parallelised:
    """Spread plain `Transformer`s, built on the meta device, over the ranks of `mesh`.

    The order matters: an axis sees the weights as the axes before it left them.

    Args:
        models: the parts of the model that this rank's stages are made of, by stage.
        objective: what they are trained for.
    """
    stages = [Stage(model, objective, index) for index, model in models.items()]
    layers: dict[str, Any] = {
        name: layer for stage in stages for name, layer in stage.model.layers.items()
    }
    moe_layers = [layer.moe for layer in layers.values() if layer.moe is not None]
    traffic: dict[str, Communicator] = {}

    # 1. Experts: each rank of `ep` keeps its share, tokens travel by all-to-all.
    if mesh.ep.size() > 1:
        traffic["ep"] = shard_experts(moe_layers, mesh)

    # 2. Weights that the steps before have left whole get their gradient in parts.
    experts = [moe.experts for moe in moe_layers] if mesh.ep.size() * mesh.tp.size() > 1 else []
    partial = list(_partial_weights(stages, experts))

    # 3. FSDP2, last: it shards what is left on this rank.
    for stage in stages:
        shard_weights(stage, experts, mesh, how.dtype)

    replicas = Replicas(
        mesh.tp.get_group() if mesh.tp.size() > 1 else None,
        [module.get_parameter(name) for module, name in partial],
        _tied_copy(stages, mesh),
    )
    return Parallelised(stages, _each_weight_once(stages), replicas, how.microbatch, traffic)


def _partial_weights(
    stages: Sequence[Stage], experts: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module, str]]:
    """Weights of which each rank of `tp` has a copy and a part of the gradient."""
    of_experts = {weight for module in experts for weight in module.parameters()}
    for stage in stages:
        for name, weight in stage.named_parameters():
            if weight not in of_experts and not isinstance(weight, DTensor):
                yield stage, name


def _each_weight_once(stages: Sequence[Stage]) -> nn.Module:
    """The weights of all stages as one module, without the copy of a tied embedding."""
    if len(stages) == 1 and stages[0].is_first:
        model: nn.Module = stages[0].model
        return model
    weights = nn.Module()
    weights.layers = nn.ModuleDict()
    for stage in stages:
        weights.layers.update(stage.model.layers)
        if stage.is_first:
            weights.embedding = stage.model.embedding
        if stage.is_last:
            weights.norm, weights.lm_head = stage.model.norm, stage.model.lm_head
    return weights


def _tied_copy(stages: Sequence[Stage], mesh: Mesh) -> TiedCopy:
    original = copy = None
    for stage in stages:
        if stage.model.embedding is None or (stage.is_first and stage.is_last):
            continue
        if stage.is_first:
            original = stage.model.embedding.weight
        else:
            copy = stage.model.embedding.weight
    on_one_rank = original is not None and copy is not None
    return TiedCopy(original, copy, None if on_one_rank else mesh.pipeline_ends)
