"""Floating-point operations of a model, by formula.

A product of [m, k] and [k, n] is 2 m k n operations (Narayanan et al. 2021, arXiv:2104.04473,
appendix). Element-wise work is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pretrain.model.config import LayerKind, ModelConfig

# The chunk of `gated_delta_rule`.
CHUNK = 64


class Extent(NamedTuple):
    """What a forward pass goes over.

    Attributes:
        tokens: of all rows.
        pairs: of a query and a key that it sees, in a layer of `softmax`.
        window_pairs: the same in a layer of `sliding`.
    """

    tokens: int
    pairs: int
    window_pairs: int


def extent_of(config: ModelConfig, lengths: ArrayLike, earlier: ArrayLike = 0) -> Extent:
    """Of documents with these numbers of tokens.

    Args:
        earlier: tokens before them that layers with a window still see, as memory beyond a row.
    """
    lengths, earlier = np.asarray(lengths, np.int64), np.asarray(earlier, np.int64)
    window = config.attention.window
    # Query number i sees the i keys up to its own; with a window, so many at most.
    growing = np.clip(window - earlier, 0, lengths)
    seen = growing * earlier + growing * (growing + 1) // 2 + (lengths - growing) * window
    pairs = lengths * (lengths + 1) // 2
    return Extent(int(lengths.sum()), int(pairs.sum()), int(seen.sum()))


@dataclass(frozen=True)
class Work:
    """Operations of a part of a model, forward and backward.

    Attributes:
        forward: of a forward pass.
        backward: what the derivatives take.
        repeated: what the backward pass of a kernel computes once more, as the kernel has not kept
            it. No part of what the model needs.
    """

    forward: float
    backward: float
    repeated: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.backward + other.backward,
            self.repeated + other.repeated,
        )


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
    extent = extent_of(config, seq_len)
    by_kind = {
        kind: mixer(config, kind, extent).forward + feed_forward(config, seq_len).forward
        for kind in config.layer_pattern
    }
    return Costs(
        embedding=float(seq_len * config.d_model),
        layers=[by_kind[kind] for kind in config.layer_kinds()],
        head=head(config, seq_len).forward,
    )


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Of the whole model, for one sequence of one document."""
    costs = forward_costs(config, seq_len)
    return sum(costs.layers) + costs.head


def mixer(config: ModelConfig, kind: LayerKind, extent: Extent) -> Work:
    """One layer's attention or gated delta net, projections included."""
    if kind == "linear":
        return _gated_delta(config, extent.tokens)
    return _attention(
        config, extent.tokens, extent.pairs if kind == "softmax" else extent.window_pairs
    )


def feed_forward(config: ModelConfig, tokens: int, dropped_slots: float = 0) -> Work:
    """One layer's dense SwiGLU, or router, chosen experts and shared expert."""
    return router(config, tokens) + mixture(config, tokens, dropped_slots)


def router(config: ModelConfig, tokens: int) -> Work:
    """Of one layer; nothing in a dense model."""
    return _products(2.0 * tokens * config.d_model * config.moe.n_experts)


def mixture(config: ModelConfig, tokens: int, dropped_slots: float = 0) -> Work:
    """One layer's `feed_forward` without the router.

    Args:
        dropped_slots: choices of experts that were over capacity.
    """
    moe, d = config.moe, config.d_model
    if not moe.n_experts:
        return _products(6.0 * tokens * d * config.d_ff)
    experts = 3 * (moe.top_k * tokens - dropped_slots) * moe.d_expert
    shared = tokens * (3 * moe.d_shared_expert + 1) if moe.d_shared_expert else 0
    return _products(2.0 * d * (experts + shared))


def head(config: ModelConfig, tokens: int) -> Work:
    """The last projection, with the loss."""
    return _products(2.0 * tokens * config.d_model * config.vocab_size)


def _products(forward: float) -> Work:
    """Both factors of a product get a gradient by another product of its size."""
    return Work(forward, 2 * forward)


def _attention(config: ModelConfig, tokens: int, pairs: int) -> Work:
    """Q K^T and P V are 2 x 2 x width for each pair of a query and a key that it sees.

    The backward pass has Q K^T once more (FlashAttention-2, arXiv:2307.08691, algorithm 2).
    """
    c = config.attention
    d_query, d_key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    of_queries = 3 if c.output_gate else 2  # query, output, gate
    projections = _products(2.0 * tokens * config.d_model * (of_queries * d_query + 2 * d_key))
    product = 2.0 * pairs * d_query
    return projections + Work(2 * product, 4 * product, product)


def _gated_delta(config: ModelConfig, tokens: int) -> Work:
    """The products of chunks of C tokens (Yang et al. 2024, arXiv:2412.06464, section 3.3).

    In the names of `gated_delta_chunks`, in multiplications of a chunk: A, P and W take C^2 D each,
    U and P V' C^2 E, the inverse T C^3 / 2; q S, W S and the state's update C D E. The gradients of
    all but W and T take two products each. The backward pass has all but the outputs once more.
    """
    c = config.linear
    D, E, C = c.key_dim, c.value_dim, CHUNK
    d_key, d_value = c.n_key_heads * D, c.n_value_heads * E
    projections = 2.0 * config.d_model * (2 * d_key + 3 * d_value + 2 * c.n_value_heads)
    convolution = 2.0 * c.conv_width * (2 * d_key + d_value)
    per_token = 2.0 * c.n_value_heads
    outputs = C * E + D * E
    states = C * (3 * D + E) + C**2 / 2 + 2 * D * E
    scan = Work(states + outputs, 4 * C * (D + E) + 6 * D * E, states)
    return _products(tokens * (projections + convolution)) + Work(
        *(tokens * per_token * x for x in (scan.forward, scan.backward, scan.repeated))
    )
