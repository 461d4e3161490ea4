"""The formulas against torch's own count of what the model runs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain.metrics.flops import feed_forward_flops, forward_costs, forward_flops, mixer_flops
from pretrain.model.attention import Attention
from pretrain.model.config import (
    AttentionConfig,
    LayerKind,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from pretrain.model.gated_delta import GatedDeltaNet
from pretrain.model.kernels import gated_delta_chunks as chunks
from pretrain.model.kernels.documents import Documents
from pretrain.model.mlp import SwiGLU
from pretrain.model.moe import MoE
from pretrain.model.rope import Rotation

T = 128
CONFIG = ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=4,
    d_ff=48,
    layer_pattern=("linear", "linear", "linear", "softmax"),
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
    linear=LinearAttentionConfig(n_key_heads=2, n_value_heads=4, key_dim=8, value_dim=24),
    moe=MoEConfig(n_experts=8, top_k=3, d_expert=20, d_shared_expert=12),
)


def counted(compute: Any) -> float:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_})
    with counter:
        compute()
    return float(counter.get_total_flops())


def baddbmm_(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    """What torch counts for baddbmm, of which it forgets the in-place form."""
    return 2 * a[0] * a[1] * a[2] * b[2]


@pytest.mark.parametrize("output_gate", [True, False])
@pytest.mark.parametrize(
    ("kind", "window"), [("softmax", 5), ("sliding", 5), ("sliding", T), ("sliding", 2 * T)]
)
def test_attention(kind: LayerKind, window: int, output_gate: bool) -> None:
    config = ModelConfig(
        d_model=32,
        attention=AttentionConfig(4, 2, 16, output_gate=output_gate, window=window),
    )
    attention = Attention(config, config.window(kind))
    # torch counts nothing of attention on CPU: its share is two products of what is visible.
    attention.core = products_of_visible_pairs
    x = torch.zeros(1, T, 32)
    rotation = Rotation.of_positions(torch.arange(T)[None], 4, 1e4)
    documents = Documents.whole_rows(1, T, torch.device("cpu"))
    expected = counted(lambda: attention(x, documents, rotation))
    assert mixer_flops(config, kind, T) == expected


def products_of_visible_pairs(q: Tensor, *_: Any, scale: float, window: int | None) -> Tensor:
    distance = torch.arange(T)[:, None] - torch.arange(T)
    visible = (distance >= 0) & (distance < (window or T))
    keys = q.new_zeros(*q.shape[:2], int(visible.sum()), q.shape[3])
    _ = (q[:, :, :1] @ keys.mT) @ keys
    return q


def test_gated_delta() -> None:
    layer = GatedDeltaNet(CONFIG)
    c = CONFIG.linear
    # The scan is one operation to torch: count its chunks apart.
    layer.scan = lambda q, k, v, g, beta, documents: (v, None)
    projections = counted(
        lambda: layer(torch.zeros(1, T, 32), Documents.whole_rows(1, T, torch.device("cpu")))
    )
    n = T // 64 * c.n_value_heads
    segment = chunks.Segment(
        q=torch.zeros(n, 64, c.key_dim),
        k=torch.zeros(n, 64, c.key_dim),
        v=torch.zeros(n, 64, c.value_dim),
        g=torch.zeros(n, 64, 1),
        beta=torch.zeros(n, 64, 1),
        boundaries=None,
    )
    products = counted(lambda: scan(segment, c))
    inverse = n * 64**3
    convolution = 2 * c.conv_width * T * (2 * 2 * c.key_dim + 4 * c.value_dim)
    expected = projections + products + inverse + convolution
    assert mixer_flops(CONFIG, "linear", T) == expected


def scan(segment: chunks.Segment, c: LinearAttentionConfig) -> None:
    prepared = chunks.prepare(segment)
    state = torch.zeros(c.n_value_heads, c.key_dim, c.value_dim)
    states, V_new = chunks.scan_states(prepared, prepared.U, state)
    chunks.outputs(segment, prepared, states, V_new)


def test_experts() -> None:
    moe = MoE(32, CONFIG.moe)
    # The experts are one operation to torch: each token goes through top_k SwiGLUs.
    moe.dispatch = lambda x, *_: lambda: x
    around = counted(lambda: moe(torch.zeros(1, T, 32)))
    rows = T * CONFIG.moe.top_k
    experts = counted(lambda: SwiGLU(32, CONFIG.moe.d_expert)(torch.zeros(rows, 32)))
    assert feed_forward_flops(CONFIG, T) == around + experts


def test_dense_feed_forward() -> None:
    config = ModelConfig(d_model=32, d_ff=48, moe=MoEConfig(n_experts=0))
    expected = counted(lambda: SwiGLU(32, 48)(torch.zeros(1, T, 32)))
    assert feed_forward_flops(config, T) == expected


def test_the_parts_are_those_of_the_model() -> None:
    costs = forward_costs(CONFIG, T)
    linear, softmax = (mixer_flops(CONFIG, kind, T) for kind in ("linear", "softmax"))
    feed_forward = feed_forward_flops(CONFIG, T)
    assert costs.layers == [*3 * [linear + feed_forward], softmax + feed_forward]
    assert costs.head == counted(lambda: torch.zeros(T, 32) @ torch.zeros(32, 96))
    assert forward_flops(CONFIG, T) == sum(costs.layers) + costs.head
    assert 0 < costs.embedding < 0.01 * min(costs.layers)
