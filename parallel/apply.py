"""How a model is spread over ranks: the one function to read first."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from parallel.comm import Communicator
from parallel.expert.shard import shard_experts
from parallel.fsdp import shard_weights
from parallel.mesh import Mesh


@dataclass(frozen=True)
class Parallelised:
    """A model whose layers know their ranks.

    Attributes:
        model: the same module, its weights sharded; call it as before.
        expert_traffic: what expert parallelism sent, or None without it.
    """

    model: Any
    expert_traffic: Communicator | None

    def accumulate_gradients(self, *, is_last: bool) -> None:
        """Whether the next backward pass completes the step, and so reduces the gradients."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last)
        self.model.set_is_last_backward(is_last)


def apply(model: Any, mesh: Mesh, dtype: torch.dtype) -> Parallelised:
    """Spread a plain `Transformer`, built on the meta device, over the ranks of `mesh`.

    The order matters: an axis sees the weights as the axes before it left them.
    """
    moe_layers = [module for module in model.modules() if hasattr(module, "dispatch")]
    layers: list[nn.Module] = list(model.layers.values())

    # 1. Experts: each rank of `ep` keeps its share, tokens travel by all-to-all.
    expert_traffic = shard_experts(moe_layers, mesh) if mesh.ep.size() > 1 else None

    # 2. FSDP2, last: it shards what the steps before have left on this rank.
    experts = [moe.experts for moe in moe_layers] if mesh.ep.size() > 1 else []
    shard_weights(model, layers, experts, mesh, dtype)

    return Parallelised(model, expert_traffic)
