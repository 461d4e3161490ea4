"""Floating-point operations of a forward pass, by formula, and what they say of a layer's cost.

A product of [m, k] and [k, n] is 2 m k n operations (Narayanan et al. 2021, arXiv:2104.04473,
appendix). Element-wise work is left out. A backward pass is twice the forward.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.model.config import LayerKind, ModelConfig

# The chunk of `gated_delta_rule`.
CHUNK = 64


class Costs(NamedTuple):
    """Forward operations of one sequence.

    Attributes:
        embedding: the lookup, as one operation per element it reads; its time is that of memory.
        layers: of each layer.
        head: the last projection, with the loss.
    """

    embedding: float
    layers: Sequence[float]
    head: float


def forward_costs(config: ModelConfig, seq_len: int) -> Costs:
    """Of every part of the model, for one sequence of one document."""
    by_kind = {
        kind: mixer_flops(config, kind, seq_len) + feed_forward_flops(config, seq_len)
        for kind in config.layer_pattern
    }
    return Costs(
        embedding=float(seq_len * config.d_model),
        layers=[by_kind[kind] for kind in config.layer_kinds()],
        head=2.0 * seq_len * config.d_model * config.vocab_size,
    )


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Of the whole model, for one sequence."""
    costs = forward_costs(config, seq_len)
    return sum(costs.layers) + costs.head


def mixer_flops(config: ModelConfig, kind: LayerKind, seq_len: int) -> float:
    """Of one layer's attention or gated delta net, projections included."""
    if kind == "linear":
        return _gated_delta_flops(config, seq_len)
    return _attention_flops(config, seq_len, config.window(kind))


def feed_forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Of one layer's dense SwiGLU, or of router, chosen experts and shared expert."""
    moe, d = config.moe, config.d_model
    if not moe.n_experts:
        return 6.0 * seq_len * d * config.d_ff
    router = moe.n_experts
    experts = 3 * moe.top_k * moe.d_expert
    shared = 3 * moe.d_shared_expert + 1 if moe.d_shared_expert else 0
    return 2.0 * seq_len * d * (router + experts + shared)


def _attention_flops(config: ModelConfig, seq_len: int, window: int | None) -> float:
    """Q K^T and P V are 2 x 2 x width for each pair of a query and a key that it sees."""
    c = config.attention
    d_query, d_key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    of_queries = 3 if c.output_gate else 2  # query, output, gate
    projections = 2.0 * seq_len * config.d_model * (of_queries * d_query + 2 * d_key)
    # Query number i sees i keys, its own included, up to the window.
    most = seq_len if window is None else min(window, seq_len)
    pairs = most * (most + 1) // 2 + (seq_len - most) * most
    return projections + 4.0 * pairs * d_query


def _gated_delta_flops(config: ModelConfig, seq_len: int) -> float:
    """The products of a chunk of C tokens (Yang et al. 2024, arXiv:2412.06464, section 3.3).

    In the names of `gated_delta_chunks`: A, P and W take C^2 D multiplications each, U and P V'
    C^2 E, the inverse T C^3 / 2; q S, W S and the state's update C D E.
    """
    c = config.linear
    d_key, d_value = c.n_key_heads * c.key_dim, c.n_value_heads * c.value_dim
    projections = 2.0 * config.d_model * (2 * d_key + 3 * d_value + 2 * c.n_value_heads)
    convolution = 2.0 * c.conv_width * (2 * d_key + d_value)
    chunk = CHUNK * (3 * c.key_dim + 2 * c.value_dim) + CHUNK**2 / 2
    scan = 2.0 * c.n_value_heads * (chunk + 3 * c.key_dim * c.value_dim)
    return seq_len * (projections + convolution + scan)
