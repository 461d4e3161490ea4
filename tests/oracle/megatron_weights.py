"""The weights of our Transformer and of megatron-core's GPTModel, each from the other.

A rank of megatron-core holds a part of the model, under names of its own: `to_megatron` makes that
part from the whole weights under our names, `from_megatron` brings it back under our names, and
`whole` puts the parts of all ranks together. Gradients are mapped as weights are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.config import AttentionConfig

Weights = dict[str, Tensor]

MODEL = {
    "embedding.word_embeddings.weight": ["embedding.weight"],
    "decoder.final_layernorm.weight": ["norm.weight"],
}
OUTPUT = "output_layer.weight"
QKV = "self_attention.linear_qkv.weight"
LAYER = {
    "input_layernorm.weight": ["mixer_norm.weight"],
    QKV: [f"attention.{part}_proj.weight" for part in "qkv"],
    "self_attention.q_layernorm.weight": ["attention.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["attention.k_norm.weight"],
    "self_attention.linear_proj.weight": ["attention.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["feed_forward_norm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate.weight", "mlp.up.weight"],
    "mlp.linear_fc2.weight": ["mlp.down.weight"],
    "mlp.router.weight": ["moe.router.weight"],
}
EXPERT = {"linear_fc1.weight": "gate_up", "linear_fc2.weight": "down"}

# The dimension along which tensor parallelism splits a weight; it splits no other.
SPLIT_DIM = {
    "embedding.weight": 0,
    "lm_head.weight": 0,
    "attention.q_proj.weight": 0,
    "attention.k_proj.weight": 0,
    "attention.v_proj.weight": 0,
    "attention.o_proj.weight": 1,
    "mlp.gate.weight": 0,
    "mlp.up.weight": 0,
    "mlp.down.weight": 1,
}


@dataclass(frozen=True)
class Part:
    """Which part of the model a rank of megatron-core holds.

    Attributes:
        first_layer: the number of its first layer.
        first_expert: the number of its first expert.
        tp_rank, tp: its place among the `tp` ranks that share a layer.
        tied: whether the output embedding is the embedding, of which a last stage has a copy.
    """

    first_layer: int
    first_expert: int
    tp_rank: int
    tp: int
    tied: bool

    def our_names(self, name: str) -> list[str]:
        """Our weights that are one behind the other in megatron-core's `name`."""
        if name in MODEL:
            return MODEL[name]
        if name == OUTPUT:
            return ["embedding.weight" if self.tied else "lm_head.weight"]
        _, _, layer, leaf = name.split(".", 3)
        prefix = f"layers.{self.first_layer + int(layer)}"
        if leaf in LAYER:
            return [f"{prefix}.{ours}" for ours in LAYER[leaf]]
        _, _, _, expert, leaf = leaf.split(".", 4)
        return [f"{prefix}.moe.experts.{self.first_expert + int(expert)}.{EXPERT[leaf]}"]


def to_megatron(
    weights: Mapping[str, Tensor], names: Iterable[str], part: Part, attention: AttentionConfig
) -> Weights:
    """The weights `names` of megatron-core on the rank that holds `part`, from ours, whole."""
    single = _unstack_experts(weights)
    return {
        name: _interleave(
            [_split(ours, single[ours], part) for ours in part.our_names(name)],
            _groups(name, part, attention),
        )
        for name in names
    }


def from_megatron(weights: Mapping[str, Tensor], part: Part, attention: AttentionConfig) -> Weights:
    """The inverse of `to_megatron`: our weights as far as they are in `part`."""
    ours: Weights = {}
    for name, weight in weights.items():
        rows = [1] * len(part.our_names(name))
        if name.endswith(QKV):
            rows = [attention.n_heads // attention.n_kv_heads, 1, 1]
        pieces = _deinterleave(weight, rows, _groups(name, part, attention))
        ours |= dict(zip(part.our_names(name), pieces, strict=True))
    return ours


def whole(parts: Sequence[tuple[Part, Weights]]) -> Weights:
    """Our whole weights, from the parts of all ranks."""
    by_tp_rank: dict[str, dict[int, Tensor]] = {}
    for part, weights in parts:
        for name, weight in weights.items():
            by_tp_rank.setdefault(name, {})[part.tp_rank] = weight
    merged = {}
    for name, shares in by_tp_rank.items():
        dim = _split_dim(name)
        in_order = [shares[rank] for rank in sorted(shares)]
        merged[name] = in_order[0] if dim is None else torch.cat(in_order, dim)
    return _stack_experts(merged)


def _groups(name: str, part: Part, attention: AttentionConfig) -> int:
    """Queries, keys and values alternate, one KV head and its query heads after the other."""
    return attention.n_kv_heads // part.tp if name.endswith(QKV) else 1


def _interleave(pieces: list[Tensor], groups: int) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.unflatten(0, (groups, -1)) for piece in pieces], 1).flatten(0, 1)


def _deinterleave(weight: Tensor, rows: list[int], groups: int) -> list[Tensor]:
    if len(rows) == 1:
        return [weight]
    grouped = weight.unflatten(0, (groups, sum(rows), -1))
    return [piece.flatten(0, 2) for piece in grouped.split(rows, 1)]


def _split_dim(name: str) -> int | None:
    return next((dim for leaf, dim in SPLIT_DIM.items() if name.endswith(leaf)), None)


def _split(name: str, weight: Tensor, part: Part) -> Tensor:
    dim = _split_dim(name)
    return weight if dim is None else weight.chunk(part.tp, dim)[part.tp_rank]


def _unstack_experts(weights: Mapping[str, Tensor]) -> Weights:
    """`experts.down` [E, ...] becomes `experts.0.down`, `experts.1.down` and so on."""
    single = {}
    for name, weight in weights.items():
        if ".experts." in name:
            prefix, leaf = name.rsplit(".", 1)
            single |= {f"{prefix}.{expert}.{leaf}": w for expert, w in enumerate(weight)}
        else:
            single[name] = weight
    return single


def _stack_experts(single: Weights) -> Weights:
    weights: Weights = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, weight in single.items():
        if ".experts." in name:
            prefix, expert, leaf = name.rsplit(".", 2)
            experts.setdefault(f"{prefix}.{leaf}", {})[int(expert)] = weight
        else:
            weights[name] = weight
    for name, shares in experts.items():
        weights[name] = torch.stack([shares[expert] for expert in sorted(shares)])
    return weights
