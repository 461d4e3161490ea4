"""The formulas against torch's own count of what real forward and backward passes run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.metrics.flops import (
    extent_of,
    feed_forward,
    forward_costs,
    forward_flops,
    mixer,
)
from pretrain.model.attention import Attention
from pretrain.model.config import (
    AttentionConfig,
    LayerKind,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from pretrain.model.gated_delta import GatedDeltaNet
from pretrain.model.kernels import cpu_flash, experts_loop, gated_delta_scan
from pretrain.model.kernels import gated_delta_chunks as chunks
from pretrain.model.kernels.documents import Documents
from pretrain.model.mlp import SwiGLU
from pretrain.model.moe import MoE
from pretrain.model.rope import Rotation
from tests.ranks import run_on_ranks
from tests.unit.pretrain.metrics.flop_counter import counted

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
RANKS = 2
SIZES = (
    "data.seq_len=256 model.layer_pattern=[linear,sliding,linear,softmax] "
    "model.attention.window=50 train.global_batch=2 train.microbatch=1"
)
DENSE = "model.moe.n_experts=0"
STEPS = {
    "nothing again": "",
    "context": "parallel.cp=2",
    "full": "parallel.recompute=full",
    "full, dense": f"parallel.recompute=[full,none] {DENSE}",
    "selective, tiles": "parallel.recompute=selective parallel.feed_forward_tile=128",
    "grouped products": "grouped",
    "capacity": "model.moe.capacity_factor=0.5",
    "segments": "context.segments=4 context.gradient=2",
    "segments apart": "context.segments=4 context.carry=false",
}


@pytest.fixture(scope="module")
def steps(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank has counted and predicted of each case."""
    folder = tmp_path_factory.mktemp("flops")
    cases = [f"{name}:{SIZES} {overrides}" for name, overrides in STEPS.items()]
    run_on_ranks(RANKS, Path(__file__).with_name("flop_cases.py"), str(shards), str(folder), *cases)
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(RANKS)]
        for name in STEPS
    }


@pytest.mark.parametrize("name", STEPS)
def test_operations_of_a_step_are_those_that_its_ranks_compute(
    name: str, steps: dict[str, list[Any]]
) -> None:
    computed = sum(rank["counted"] for rank in steps[name])
    predicted = steps[name][0]["predicted"]
    assert predicted["hardware"] == pytest.approx(computed, rel=0.02)
    assert steps[name][1]["predicted"] == predicted
    assert all(rank["documents"] > 1 for rank in steps[name])


def test_nothing_is_repeated_but_within_kernels_unless_layers_recompute(
    steps: dict[str, list[Any]],
) -> None:
    share = {
        name: rank["predicted"]["model"] / rank["predicted"]["hardware"]
        for name, (rank, _) in steps.items()
    }
    assert 0.95 < share["nothing again"] < 1
    assert 0.75 < share["full"] < 0.8
    assert share["segments"] < share["capacity"]


def test_pairs_are_those_that_are_seen() -> None:
    config = ModelConfig(attention=AttentionConfig(window=5))
    lengths, earlier = (1, 3, 9, 4, 2), (0, 3, 7, 0, 1)

    def seen(window: int, *, before: bool) -> int:
        return sum(
            min(place + past * before, window)
            for length, past in zip(lengths, earlier, strict=True)
            for place in range(1, length + 1)
        )

    assert extent_of(config, lengths, earlier) == (19, seen(99, before=False), seen(5, before=True))


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_the_count_of_attention_is_that_of_its_products() -> None:
    q, k, v = randoms(*[(2, 3, 16, 8)] * 3)
    whole = counted(lambda: cpu_flash.forward(q, k, v, False, 1.0))
    assert whole == counted(lambda: (q @ k.mT).softmax(-1) @ v)
    causal = counted(lambda: cpu_flash.forward(q, k, v, True, 1.0))
    rows = [(q[:, :, i, None] @ k[:, :, : i + 1].mT, v[:, :, : i + 1]) for i in range(16)]
    assert causal == 2 * counted(lambda: [scores @ values for scores, values in rows])

    out, lse = cpu_flash.forward(q, k, v, False, 1.0)
    backward = counted(lambda: cpu_flash.backward(out, q, k, v, out, lse, False, 1.0))
    dense = (q @ k.mT).softmax(-1) @ v
    assert backward == counted(lambda: dense.sum().backward()) + counted(lambda: q @ k.mT)
    out, lse = cpu_flash.forward(q, k, v, True, 1.0)
    assert 2.5 * causal == counted(lambda: cpu_flash.backward(out, q, k, v, out, lse, True, 1.0))


def test_the_count_of_grouped_products_is_that_of_each_group() -> None:
    x, weight = randoms((24, 16), (3, 16, 8))
    ends = torch.tensor([4, 4, 24], dtype=torch.int32)
    of_groups = [(x[:4], weight[0]), (x[4:], weight[2])]

    def grouped() -> Tensor:
        return F.grouped_mm(x, weight, offs=ends)

    def one_by_one() -> Tensor:
        return torch.cat([rows @ matrix for rows, matrix in of_groups])

    assert counted(grouped) == counted(one_by_one) > 0
    (ours,), (theirs,) = randoms((24, 8)), randoms((24, 8))
    both = [make() for make in (grouped, one_by_one)]
    ours, theirs = (counted(lambda y=y: y.backward(torch.ones(24, 8))) for y in both)
    assert ours == theirs > 0


def test_the_count_of_experts_is_that_of_each_expert() -> None:
    x, weights, gate_up, down = randoms((12, 16), (24, 1), (3, 16, 16), (3, 16, 8))
    token, counts = torch.arange(12).repeat_interleave(2), torch.tensor([10, 0, 14])
    slots = [slice(0, 10), slice(10, 10), slice(10, 24)]

    def mixed() -> Tensor:
        return experts_loop._LoopedMixture.apply(x, weights, gate_up, down, token, counts)

    def one_by_one() -> Tensor:
        outputs = []
        for expert, rows in enumerate(slots):
            gate, up = (x[token[rows]] @ gate_up[expert].T).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up * weights[rows]) @ down[expert].T)
        return torch.cat(outputs)

    assert counted(mixed) == counted(one_by_one) > 0
    both = [make().sum() for make in (mixed, one_by_one)]
    ours, theirs = (counted(lambda y=y: y.backward()) for y in both)
    assert ours == theirs > 0


def test_the_count_of_the_delta_rule_is_that_of_its_products() -> None:
    """Its two operations, against what torch counts of the functions behind them."""
    B, Hk, Hv, D, E = 2, 2, 4, 8, 24
    q, k, v, g, beta = randoms((B, Hk, T, D), (B, Hk, T, D), (B, Hv, T, E), (B, Hv, T), (B, Hv, T))
    state = torch.zeros(B, Hv, D, E)
    inputs = tuple(x.detach() for x in (q, k, v, -g.abs(), beta.sigmoid()))
    arguments = (*inputs, state, None, [T], [gated_delta_scan.KNOWN], 1.0, 64)
    forward = gated_delta_scan.scan
    assert counted(lambda: forward(*arguments)) == counted(lambda: forward._init_fn(*arguments)) > 0
    out, states, borders, *_ = forward(*arguments)
    arguments = (torch.ones_like(out), states, *inputs, borders, None, [T], 1.0, 64)
    backward = gated_delta_scan.scan_backward
    expected = counted(lambda: backward._init_fn(*arguments))
    assert counted(lambda: backward(*arguments)) == expected > 0


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
    assert mixer(config, kind, extent_of(config, T)).forward == expected


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
    convolution = 2 * c.conv_width * T * (2 * 2 * c.key_dim + 4 * c.value_dim)
    expected = projections + products + convolution
    assert mixer(CONFIG, "linear", extent_of(CONFIG, T)).forward == expected


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
    assert feed_forward(CONFIG, T).forward == around + experts


def test_dense_feed_forward() -> None:
    config = ModelConfig(d_model=32, d_ff=48, moe=MoEConfig(n_experts=0))
    expected = counted(lambda: SwiGLU(32, 48)(torch.zeros(1, T, 32)))
    assert feed_forward(config, T).forward == expected


def test_the_parts_are_those_of_the_model() -> None:
    costs = forward_costs(CONFIG, T)
    extent = extent_of(CONFIG, T)
    linear, softmax = (mixer(CONFIG, kind, extent).forward for kind in ("linear", "softmax"))
    after = feed_forward(CONFIG, T).forward
    assert costs.layers == [*3 * [linear + after], softmax + after]
    assert costs.head == counted(lambda: torch.zeros(T, 32) @ torch.zeros(32, 96))
    assert forward_flops(CONFIG, T) == sum(costs.layers) + costs.head
    assert 0 < costs.embedding < 0.01 * min(costs.layers)
