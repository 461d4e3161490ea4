"""Our state dict under the names and in the layout of the hub's Qwen3 checkpoints, and back."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.model.config import ModelConfig

State = Mapping[str, Tensor]


def state_to_hf(config: ModelConfig, state: State) -> dict[str, Tensor]:
    """The state dict of `Transformer` under the names and in the layout of the hub."""
    return {
        name: tensor.contiguous()
        for rule in _rules(config)
        for name, tensor in zip(
            rule.theirs, rule.to_theirs([state[name] for name in rule.ours]), strict=True
        )
    }


def state_from_hf(config: ModelConfig, state: State) -> dict[str, Tensor]:
    """The inverse of `state_to_hf`; weights of multi-token prediction (`mtp.*`) are left out.

    Raises:
        UserError: a weight is missing, or one is there that the configuration has no place for.
    """
    rules = list(_rules(config))
    expected = {name for rule in rules for name in rule.theirs}
    if config.tie_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    unexpected = sorted(name for name in state.keys() - expected if not name.startswith("mtp."))
    for problem, names in [("missing", sorted(expected - state.keys())), ("unknown", unexpected)]:
        if names:
            raise UserError(
                f"weights {problem}: {', '.join(names[:3])} ({len(names)} in all); "
                "the weights and config.json are not of one model"
            )
    return {
        name: tensor.contiguous()
        for rule in rules
        for name, tensor in zip(
            rule.ours, rule.to_ours([state[name] for name in rule.theirs]), strict=True
        )
    }


def expert_by_expert(config: ModelConfig, state: State) -> dict[str, Tensor]:
    """A state dict of transformers' own model, which stacks experts, as the hub has it.

    What is not of the model's size stays as it is.

    Args:
        state: its names may have a prefix, and its tensors may be flat.
    """
    n_experts, d_expert, d_model = config.moe.n_experts, config.moe.d_expert, config.d_model
    stacked = {
        "gate_up_proj": (("gate", "up"), (n_experts, 2, d_expert, d_model)),
        "down_proj": (("down",), (n_experts, 1, d_model, d_expert)),
    }
    single = {}
    for name, tensor in state.items():
        experts, _, leaf = name.rpartition(".")
        parts, shape = stacked.get(leaf, ((), ()))
        if experts.endswith(".experts") and parts and tensor.numel() == math.prod(shape):
            for expert, weights in enumerate(tensor.reshape(shape)):
                for part, weight in zip(parts, weights, strict=True):
                    single[f"{experts}.{expert}.{part}_proj.weight"] = weight
        else:
            single[name] = tensor
    return single


@dataclass(frozen=True)
class _Rule:
    """Some of our tensors and the ones of the hub that hold the same numbers."""

    ours: list[str]
    theirs: list[str]
    to_theirs: Callable[[list[Tensor]], list[Tensor]] = list
    to_ours: Callable[[list[Tensor]], list[Tensor]] = list


def _rules(config: ModelConfig) -> Iterator[_Rule]:
    yield _Rule(["embedding.weight"], ["model.embed_tokens.weight"])
    yield _Rule(["norm.weight"], ["model.norm.weight"])
    if not config.tie_embeddings:
        yield _Rule(["lm_head.weight"], ["lm_head.weight"])
    for i, kind in enumerate(config.layer_kinds()):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield _Rule([f"{ours}.mixer_norm.weight"], [f"{theirs}.input_layernorm.weight"])
        yield _Rule(
            [f"{ours}.feed_forward_norm.weight"], [f"{theirs}.post_attention_layernorm.weight"]
        )
        if kind == "linear":
            yield from _gated_delta_rules(config, f"{ours}.gated_delta", f"{theirs}.linear_attn")
        else:
            yield from _attention_rules(config, f"{ours}.attention", f"{theirs}.self_attn")
        if config.moe.n_experts > 0:
            yield from _moe_rules(config, f"{ours}.moe", f"{theirs}.mlp")
        else:
            yield from _mlp_rules(f"{ours}.mlp", f"{theirs}.mlp")


def _attention_rules(config: ModelConfig, ours: str, theirs: str) -> Iterator[_Rule]:
    for name in ("k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        yield _Rule([f"{ours}.{name}.weight"], [f"{theirs}.{name}.weight"])
    c = config.attention
    if c.output_gate:
        both = [f"{ours}.q_proj.weight", f"{ours}.gate_proj.weight"]
        yield _interleaved(both, f"{theirs}.q_proj.weight", c.n_heads, [c.head_dim, c.head_dim])
    else:
        yield _Rule([f"{ours}.q_proj.weight"], [f"{theirs}.q_proj.weight"])


def _gated_delta_rules(config: ModelConfig, ours: str, theirs: str) -> Iterator[_Rule]:
    c = config.linear
    for our_name, their_name in [
        ("A_log", "A_log"),
        ("dt_bias", "dt_bias"),
        ("norm.weight", "norm.weight"),
        ("o_proj.weight", "out_proj.weight"),
    ]:
        yield _Rule([f"{ours}.{our_name}"], [f"{theirs}.{their_name}"])
    ratio = c.n_value_heads // c.n_key_heads
    yield _interleaved(
        [f"{ours}.{name}_proj.weight" for name in "qkvz"],
        f"{theirs}.in_proj_qkvz.weight",
        c.n_key_heads,
        [c.key_dim, c.key_dim, ratio * c.value_dim, ratio * c.value_dim],
    )
    yield _interleaved(
        [f"{ours}.{name}_proj.weight" for name in "ba"],
        f"{theirs}.in_proj_ba.weight",
        c.n_key_heads,
        [ratio, ratio],
    )
    d_key, d_value = c.n_key_heads * c.key_dim, c.n_value_heads * c.value_dim
    yield _Rule(
        [f"{ours}.{name}_conv" for name in "qkv"],
        [f"{theirs}.conv1d.weight"],
        to_theirs=lambda convs: [torch.cat(convs)[:, None]],
        to_ours=lambda conv: list(conv[0][:, 0].split([d_key, d_key, d_value])),
    )


def _moe_rules(config: ModelConfig, ours: str, theirs: str) -> Iterator[_Rule]:
    c = config.moe
    yield _Rule([f"{ours}.router.weight"], [f"{theirs}.gate.weight"])
    yield _Rule(
        [f"{ours}.experts.gate_up"],
        [
            f"{theirs}.experts.{expert}.{name}_proj.weight"
            for expert in range(c.n_experts)
            for name in ("gate", "up")
        ],
        to_theirs=lambda fused: _copies(fused[0].unflatten(1, (2, -1)).flatten(0, 1)),
        to_ours=lambda single: [torch.stack(single).unflatten(0, (-1, 2)).flatten(1, 2)],
    )
    yield _Rule(
        [f"{ours}.experts.down"],
        [f"{theirs}.experts.{expert}.down_proj.weight" for expert in range(c.n_experts)],
        to_theirs=lambda fused: _copies(fused[0]),
        to_ours=lambda single: [torch.stack(single)],
    )
    if c.d_shared_expert > 0:
        yield _Rule([f"{ours}.shared_gate.weight"], [f"{theirs}.shared_expert_gate.weight"])
        yield from _mlp_rules(f"{ours}.shared_expert", f"{theirs}.shared_expert")


def _copies(fused: Tensor) -> list[Tensor]:
    """Each fused[i] with memory of its own: safetensors refuses to write views."""
    return [tensor.clone() for tensor in fused.unbind()]


def _mlp_rules(ours: str, theirs: str) -> Iterator[_Rule]:
    for name in ("gate", "up", "down"):
        yield _Rule([f"{ours}.{name}.weight"], [f"{theirs}.{name}_proj.weight"])


def _interleaved(ours: list[str], theirs: str, n_heads: int, rows: list[int]) -> _Rule:
    """Their one weight holds, head after head, `rows` rows of each of ours."""
    return _Rule(
        ours,
        [theirs],
        to_theirs=lambda parts: [
            torch.cat([part.unflatten(0, (n_heads, -1)) for part in parts], dim=1).flatten(0, 1)
        ],
        to_ours=lambda fused: [
            part.flatten(0, 1) for part in fused[0].unflatten(0, (n_heads, -1)).split(rows, dim=1)
        ],
    )
