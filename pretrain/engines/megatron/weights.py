"""The weights of our Transformer and of megatron-core's GPTModel, each from the other.

A rank of megatron-core holds a part of the model, under names of its own: `fill` makes that part
from the whole weights under our names, `whole` brings the parts of all ranks back under our names.
Gradients are mapped as weights are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from pretrain.model.config import ModelConfig

Weights = dict[str, Tensor]
Named = Iterable[tuple[str, Tensor]]

NORMS = {
    "input_layernorm.weight": "mixer_norm.weight",
    "pre_mlp_layernorm.weight": "feed_forward_norm.weight",
    # Transformer Engine has them in the projections that follow.
    "self_attention.linear_qkv.layer_norm_weight": "mixer_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "feed_forward_norm.weight",
    "self_attention.q_layernorm.weight": "attention.q_norm.weight",
    "self_attention.k_layernorm.weight": "attention.k_norm.weight",
}
COPIES = {
    "mlp.router.weight": "moe.router.weight",
    "mlp.shared_experts.gate_weight": "moe.shared_gate.weight",
}
# Which ranks of tp split by rows: several of ours lie one behind the other, part by part.
ROWS = {
    "mlp.linear_fc1.weight": ["mlp.gate.weight", "mlp.up.weight"],
    "mlp.shared_experts.linear_fc1.weight": [
        "moe.shared_expert.gate.weight",
        "moe.shared_expert.up.weight",
    ],
}
COLUMNS = {
    "self_attention.linear_proj.weight": "attention.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down.weight",
    "mlp.shared_experts.linear_fc2.weight": "moe.shared_expert.down.weight",
}
QKV = "self_attention.linear_qkv.weight"
EXPERTS = "mlp.experts."
DELTA_NET = "self_attention.gated_delta."


@dataclass(frozen=True)
class Source:
    """What a weight of megatron-core is made of.

    Attributes:
        names: of our weights, whose rows lie in it by groups, a part of each in each group.
        groups: how many.
        dim: along which the ranks of tp have equal parts of that; None where each has all.
        expert: the number of the expert whose weight it is, of those that ours has stacked.
    """

    names: tuple[str, ...]
    groups: int = 1
    dim: int | None = None
    expert: int | None = None


def sources(gpt: Any, model: ModelConfig) -> dict[str, Source]:
    """Of each weight of a GPTModel, or of a rank's stage of one."""
    return {name: _source(gpt, model, name) for name, _ in gpt.named_parameters()}


def mark_shares(gpt: Any, model: ModelConfig) -> None:
    """Tell megatron-core which weights differ among the ranks of tp.

    It does so itself only where it initialises, and else leaves them out of the gradient's norm on
    all ranks of tp but the first.
    """
    parameters = dict(gpt.named_parameters())
    for name, source in sources(gpt, model).items():
        is_share = source.dim is not None or source.expert is not None
        if is_share and not getattr(parameters[name], "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameters[name], True, source.dim or 0, 1)


def fill(gpt: Any, model: ModelConfig, weight: Callable[[str], Tensor]) -> None:
    """Fill a GPTModel.

    Args:
        weight: our whole weight of that name.
    """
    tp = gpt.pg_collection.tp
    with torch.no_grad():
        parameters = dict(gpt.named_parameters())
        for name, source in sources(gpt, model).items():
            pieces = [weight(ours) for ours in source.names]
            if source.expert is not None:
                pieces = [piece[source.expert] for piece in pieces]
            joined = _interleave(pieces, source.groups)
            if source.dim is not None:
                joined = joined.chunk(tp.size(), source.dim)[tp.rank()]
            for stored in {parameters[name], stored_weight(parameters[name])}:
                stored.copy_(joined)


def stored_weight(weight: nn.Parameter) -> Tensor:
    """What the optimizer updates: in bf16 a copy in fp32, else the weight itself."""
    stored: Tensor = getattr(weight, "main_param", weight)
    return stored


def of_rank(gpt: Any, model: ModelConfig, tensors: Mapping[str, Tensor]) -> Weights:
    """Our whole weights that this rank has a part of. Collective over tp and ep.

    Args:
        tensors: of each weight of `gpt`, itself or its gradient.
    """
    groups = gpt.pg_collection
    ours: Weights = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, source in sources(gpt, model).items():
        joined = tensors[name].detach()
        if source.dim is not None:
            joined = torch.cat(_gather(joined, groups.tp), source.dim)
        if source.expert is not None:
            (stacked,) = source.names
            experts.setdefault(stacked, {})[source.expert] = joined
            continue
        pieces = _deinterleave(joined, _rows(source, model), source.groups)
        ours |= dict(zip(source.names, pieces, strict=True))
    for stacked, mine in experts.items():
        local = torch.stack([mine[expert] for expert in sorted(mine)])
        ours[stacked] = torch.cat(_gather(local, groups.ep))
    return ours


def whole(
    gpts: Iterable[Any],
    model: ModelConfig,
    tensor: Callable[[nn.Parameter], Tensor] = stored_weight,
) -> Weights:
    """Our whole weights, on every rank. Collective.

    Args:
        gpts: the stages of this rank.
        tensor: what of each weight; a gradient, for example.
    """
    mine: Weights = {}
    pp: Any = None
    for gpt in gpts:
        pp = gpt.pg_collection.pp
        tensors = {name: tensor(weight) for name, weight in gpt.named_parameters()}
        mine |= of_rank(gpt, model, tensors)
    of_stages: list[Any] = [None] * pp.size()
    dist.all_gather_object(of_stages, mine, group=pp)
    return {name: weight for stage in of_stages for name, weight in stage.items()}


def _source(gpt: Any, model: ModelConfig, name: str) -> Source:
    tp = gpt.pg_collection.tp.size()
    if name == "decoder.final_layernorm.weight":
        return Source(("norm.weight",))
    if name == "embedding.word_embeddings.weight":
        return Source(("embedding.weight",), dim=0)
    if name == "output_layer.weight":
        return Source(("embedding.weight" if model.tie_embeddings else "lm_head.weight",), dim=0)
    _, _, index, leaf = name.split(".", 3)
    prefix = f"layers.{gpt.decoder.layers[int(index)].layer_number - 1}."
    if leaf == QKV:
        parts = ["q", "gate", "k", "v"] if model.attention.output_gate else ["q", "k", "v"]
        names = tuple(f"{prefix}attention.{part}_proj.weight" for part in parts)
        return Source(names, model.attention.n_kv_heads, 0)
    if leaf.startswith(DELTA_NET):
        ours = leaf.removeprefix("self_attention.")
        copied, split_columns = ours.endswith(".norm.weight"), ours.endswith(".o_proj.weight")
        return Source((prefix + ours,), dim=None if copied else int(split_columns))
    if leaf.startswith(EXPERTS):
        return _expert(gpt, model, prefix, leaf)
    if leaf in ROWS:
        return Source(tuple(prefix + ours for ours in ROWS[leaf]), tp, 0)
    if leaf in COLUMNS:
        return Source((prefix + COLUMNS[leaf],), dim=1)
    return Source((prefix + (NORMS | COPIES)[leaf],))


def _expert(gpt: Any, model: ModelConfig, prefix: str, leaf: str) -> Source:
    """`local_experts.3.linear_fc1.weight`, or Transformer Engine's `linear_fc1.weight3`."""
    ours = "gate_up" if "linear_fc1" in leaf else "down"
    parts = leaf.removeprefix(EXPERTS).split(".")
    local = int(parts[1] if parts[0] == "local_experts" else parts[-1].removeprefix("weight"))
    ep = gpt.pg_collection.ep
    first = ep.rank() * model.moe.n_experts // ep.size()
    return Source((f"{prefix}moe.experts.{ours}",), expert=first + local)


def _rows(source: Source, model: ModelConfig) -> list[int]:
    """How many parts of a group each of our weights has."""
    heads = model.attention.n_heads // model.attention.n_kv_heads
    is_queries = ("attention.q_proj.weight", "attention.gate_proj.weight")
    return [heads if name.endswith(is_queries) else 1 for name in source.names]


def _interleave(pieces: list[Tensor], groups: int) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.unflatten(0, (groups, -1)) for piece in pieces], 1).flatten(0, 1)


def _deinterleave(weight: Tensor, rows: list[int], groups: int) -> list[Tensor]:
    if len(rows) == 1:
        return [weight]
    grouped = weight.unflatten(0, (groups, sum(rows), -1))
    return [piece.flatten(0, 2) for piece in grouped.split(rows, 1)]


def _gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
