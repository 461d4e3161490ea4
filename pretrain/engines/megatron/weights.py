"""The weights of our Transformer and of megatron-core's GPTModel, each from the other.

A rank of megatron-core holds a part of the model, under names of its own. It is made of `Piece`s,
each a box out of one of our weights; gradients and what the optimizer keeps are mapped as weights
are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from pretrain.model.config import ModelConfig

Weights = dict[str, Tensor]
TensorOf = Callable[[nn.Parameter], Tensor]

EMBEDDING = "embedding.weight"

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


@dataclass(frozen=True)
class Piece:
    """A box out of one of our weights, and where in this rank's weights its elements are.

    Attributes:
        name, shape: of our weight, whole.
        offsets, sizes: of the box, per dimension.
        weights: of megatron-core, that it lies in; of stacked experts one for each.
        dim: along which the ranks of tp have equal parts; None where each has all.
        is_stacked: along the first dimension the ranks of ep have equal parts.
        groups, first, rows: it is so many rows of each group of a weight's, from the first on.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    weights: tuple[nn.Parameter, ...]
    dim: int | None = None
    is_stacked: bool = False
    groups: int = 1
    first: int = 0
    rows: int = 0

    @property
    def region(self) -> tuple[slice, ...]:
        """Where in our weight the box is."""
        bounds = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(offset, offset + size) for offset, size in bounds)

    def views(self, of: TensorOf) -> list[Tensor]:
        """The elements, in what `of` has for each weight."""
        tensors = [of(weight).detach() for weight in self.weights]
        if not self.rows:
            return tensors
        return [x.unflatten(0, (self.groups, -1)).narrow(1, self.first, self.rows) for x in tensors]

    def take(self, of: TensorOf) -> Tensor:
        """The box: in place if it lies there in one piece, else a copy in host memory."""
        views = self.views(of)
        if len(views) == 1 and views[0].is_contiguous():
            return views[0].view(self.sizes)
        box = torch.empty(self.sizes, dtype=views[0].dtype)
        for part, view in zip(self._parts(box), views, strict=True):
            part.copy_(view)
        return box

    def put(self, box: Tensor, of: TensorOf) -> None:
        """The inverse of `take`; does nothing where that was in place."""
        for view, part in zip(self.views(of), self._parts(box), strict=True):
            if view.data_ptr() != part.data_ptr():
                view.copy_(part)

    def _parts(self, box: Tensor) -> Iterable[Tensor]:
        if self.is_stacked:
            return box.unbind()
        return [box.unflatten(0, (self.groups, -1)) if self.rows else box]


def pieces(gpt: Any, model: ModelConfig) -> list[Piece]:
    """What a GPTModel, or a rank's stage of one, has of our weights."""
    parameters, found = dict(gpt.named_parameters()), []
    experts: dict[str, dict[int, nn.Parameter]] = {}
    for name, source in sources(gpt, model).items():
        if source.expert is None:
            found += _pieces_of(parameters[name], source, gpt.pg_collection.tp, model)
        else:
            experts.setdefault(source.names[0], {})[source.expert] = parameters[name]
    for name, by_number in experts.items():
        numbers = sorted(by_number)
        each = tuple(by_number[number] for number in numbers)
        inner = tuple(each[0].shape)
        zeros = (0,) * len(inner)
        sizes, shape = (len(numbers), *inner), (model.moe.n_experts, *inner)
        found.append(Piece(name, shape, (numbers[0], *zeros), sizes, each, is_stacked=True))
    return found


def _pieces_of(weight: nn.Parameter, source: Source, tp: Any, model: ModelConfig) -> list[Piece]:
    found, first, shares = [], 0, _rows(source, model)
    # Of this rank; a weight that the ranks have copies of is one group.
    groups = source.groups if source.dim is None else max(1, source.groups // tp.size())
    unit = weight.shape[0] // (groups * sum(shares))
    for name, share in zip(source.names, shares, strict=True):
        sizes, offsets = list(weight.shape), [0] * weight.dim()
        rows = 0 if len(shares) == 1 else share * unit
        sizes[0] = groups * rows or sizes[0]
        shape = list(sizes)
        if source.dim is not None:
            shape[source.dim] *= tp.size()
            offsets[source.dim] = tp.rank() * sizes[source.dim]
        box = (tuple(shape), tuple(offsets), tuple(sizes), (weight,))
        found.append(Piece(name, *box, source.dim, groups=groups, first=first, rows=rows))
        first += rows
    return found


def stored_weight(weight: nn.Parameter) -> Tensor:
    """What the optimizer updates: in bf16 a copy in fp32, else the weight itself."""
    stored: Tensor = getattr(weight, "main_param", weight)
    return stored


def fill(mine: Sequence[Piece], box: Callable[[Piece], Tensor]) -> None:
    """Set weights, and what the optimizer has copied of them.

    Args:
        box: of a piece, in float32.
    """
    for piece in mine:
        piece.put(box(piece), stored_weight)
    follow_stored(mine)


def follow_stored(mine: Iterable[Piece]) -> None:
    """Set weights to what the optimizer has of them, rounded to their type."""
    for weight in {weight for piece in mine for weight in piece.weights}:
        weight.detach().copy_(stored_weight(weight))


def whole(mine: Iterable[Piece], groups: Any, of: TensorOf = stored_weight) -> Weights:
    """Our whole weights, on every rank. Collective.

    Args:
        mine: of all stages of this rank.
        groups: the `pg_collection` of a stage.
        of: what of each weight; a gradient, for example.
    """
    weights: Weights = {}
    for piece in mine:
        box = piece.take(of).to(piece.weights[0].device)
        if piece.is_stacked:
            box = torch.cat(_gather(box, groups.ep))
        elif piece.dim is not None:
            box = torch.cat(_gather(box, groups.tp), piece.dim)
        weights[piece.name] = box
    if groups.pp.size() == 1:
        # Those that lie in place would change with the model.
        return {name: weight.clone() for name, weight in weights.items()}
    of_stages: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(of_stages, weights, group=groups.pp)
    return {name: weight for stage in of_stages for name, weight in stage.items()}


def copy_groups(piece: Piece, model: ModelConfig) -> list[dist.ProcessGroup]:
    """The groups of ranks that have the same piece; all ranks that do are their product."""
    if piece.is_stacked:
        return _of_several(parallel_state.get_expert_data_parallel_group())
    groups = _of_several(parallel_state.get_data_parallel_group(with_context_parallel=True))
    if piece.dim is None:
        groups += _of_several(parallel_state.get_tensor_model_parallel_group())
    if piece.name == EMBEDDING and model.tie_embeddings:
        # The first and the last stage of a pipeline.
        groups += _of_several(parallel_state.get_embedding_group())
    return groups


def _of_several(group: dist.ProcessGroup) -> list[dist.ProcessGroup]:
    return [group] if group.size() > 1 else []


def _source(gpt: Any, model: ModelConfig, name: str) -> Source:
    tp = gpt.pg_collection.tp.size()
    if name == "decoder.final_layernorm.weight":
        return Source(("norm.weight",))
    if name == "embedding.word_embeddings.weight":
        return Source((EMBEDDING,), dim=0)
    if name == "output_layer.weight":
        return Source((EMBEDDING if model.tie_embeddings else "lm_head.weight",), dim=0)
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


def _gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
