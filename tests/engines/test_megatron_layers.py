"""Our layers in megatron-core without ranks: what they refuse, how rows lie, names of weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import load_config
from pretrain.engines.choice import check_engines
from pretrain.errors import UserError
from pretrain.model.kernels.documents import Documents

pytestmark = pytest.mark.oracle


def group(rank: int, size: int) -> Any:
    """Of ranks that do not talk."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def groups(tp: int = 1, cp: int = 1) -> Any:
    return SimpleNamespace(tp=group(0, tp), cp=group(0, cp), ep=group(0, 1), pp=group(0, 1))


def theirs(**settings: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    small = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "attention_dropout": 0}
    return TransformerConfig(**small | {"use_cpu_initialization": True} | settings)


def ring_attention(mask: str = "causal", rope: Any = None, **settings: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from pretrain.engines.megatron import RingAttention

    config = theirs(**settings)
    comm = config.cp_comm_type
    return RingAttention(
        config, 1, AttnMaskType[mask], "self", comm, pg_collection=groups(), rope=rope
    )


def attend(attention: Any, *, mask: Tensor | None = None, packed: Any = None) -> Tensor:
    q, k, v = torch.randn(3, 8, 1, 2, 16)
    return attention(q, k, v, mask, packed_seq_params=packed)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mask": "padding"}, "attn_mask_type = padding"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"softmax_type": "learnable"}, "softmax_type = learnable"),
        ({"window_size": (7, 7)}, "window_size = (7, 7)"),
        ({"context_parallel_size": 2, "cp_comm_type": "a2a"}, "cp_comm_type = a2a"),
    ],
)
def test_attention_refuses_settings_it_would_ignore(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        ring_attention(**settings)
    assert told in str(refused.value)


def test_attention_refuses_masks_and_foreign_documents() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from pretrain.engines.megatron import shard_batch

    attention = ring_attention()
    with pytest.raises(UserError, match="attention_mask"):
        attend(attention, mask=torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(UserError, match="format thd"):
        attend(attention, packed=PackedSeqParams(qkv_format="thd"))
    _, of_two_ranks = shard_batch({}, torch.arange(16)[None], group(0, 2))
    with pytest.raises(UserError, match="for 2 ranks, the layer has 1"):
        attend(attention, packed=of_two_ranks)
    _, of_other_rows = shard_batch({}, torch.arange(6)[None], group(0, 1))
    with pytest.raises(UserError, match=r"of a batch \(1, 6\), the layer got \(1, 8\)"):
        attend(attention, packed=of_other_rows)


def test_attention_refuses_to_decode_with_a_cache_of_keys() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    attention = ring_attention()
    q, k, v = torch.randn(3, 8, 1, 2, 16)
    with pytest.raises(UserError, match="8 keys for 1 queries"):
        attention(q[-1:], k, v, None, attn_mask_type=AttnMaskType.no_mask)
    with pytest.raises(UserError, match=r"no_mask.*export the model"):
        attention(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    attention(q, k, v, None, attn_mask_type=AttnMaskType.causal)


def test_balanced_rows_want_our_rotation() -> None:
    from pretrain.engines.megatron import Rope, shard_batch

    position = Documents.from_lengths([[3, 11, 2]]).position
    _, balanced = shard_batch({}, position, group(1, 2))
    _, zigzag = shard_batch({}, position, group(1, 2), "zigzag")
    plain, rotating = ring_attention(), ring_attention(rope=Rope())
    for attention in (plain, rotating):
        attention.group = group(1, 2)
        attention.core = lambda q, *_, **__: q
    with pytest.raises(UserError, match='layout="zigzag"'):
        attend(plain, packed=balanced)
    unrotated, rotated = attend(plain, packed=zigzag), attend(rotating, packed=balanced)
    assert unrotated.shape == rotated.shape == (8, 1, 32)


def test_rows_of_one_document_lie_as_in_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import utils

    from pretrain.engines.megatron import shard_batch

    # It asks torch of a group, which knows none here.
    monkeypatch.setattr(utils, "get_pg_size", lambda ranks: ranks.size())
    monkeypatch.setattr(utils, "get_pg_rank", lambda ranks: ranks.rank())

    tokens = torch.randint(99, (2, 24))
    position = torch.arange(24).expand(2, 24)
    for rank in range(3):
        ranks = group(rank, 3)
        expected = utils.get_batch_on_this_cp_rank({"tokens": tokens}, ranks)["tokens"]
        for layout in ("balanced", "zigzag"):
            mine, _ = shard_batch({"tokens": tokens}, position, ranks, layout)
            assert torch.equal(mine["tokens"], expected)
            assert torch.equal(tokens.gather(1, mine["position"]), expected)


def test_a_row_that_ranks_cannot_share_is_refused() -> None:
    from pretrain.engines.megatron import shard_batch

    with pytest.raises(UserError, match="multiple of 4"):
        shard_batch({}, torch.arange(6)[None], group(0, 2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"linear_num_key_heads": 3, "sequence_parallel": True}, "linear_num_key_heads = 3"),
        ({}, "sequence_parallel=True"),
    ],
)
def test_delta_net_refuses_what_nobody_would_sum_or_share(
    settings: dict[str, Any], told: str
) -> None:
    from pretrain.engines.megatron import GatedDeltaNet

    config = theirs(tensor_model_parallel_size=2, **settings)
    with pytest.raises(UserError, match=told):
        GatedDeltaNet(config, 1, groups(tp=2))


def test_a_layer_without_attention_has_no_core_to_replace() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from pretrain.engines.megatron import with_gated_delta_net, with_ring_attention

    linear = with_gated_delta_net(get_gpt_layer_local_spec())
    with pytest.raises(UserError, match="no core_attention to replace"):
        with_ring_attention(linear)


def test_weights_of_transformer_engine_are_those_of_the_local_layers() -> None:
    from pretrain.engines.megatron.weights import sources

    model = load_config("tiny-hybrid-moe", ["model.layer_pattern=[softmax]"]).model
    same = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
        "mlp.experts.local_experts.3.linear_fc1.weight": "mlp.experts.linear_fc1.weight3",
        "mlp.experts.local_experts.3.linear_fc2.weight": "mlp.experts.linear_fc2.weight3",
    }
    names = [f"decoder.layers.0.{leaf}" for leaf in (*same, *same.values())]
    gpt = SimpleNamespace(
        named_parameters=lambda: [(name, None) for name in names],
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=3)]),
        pg_collection=groups(),
    )
    found = list(sources(gpt, model).values())
    assert found[: len(same)] == found[len(same) :]
    assert found[2].names == ("layers.2.moe.experts.gate_up",)
    assert found[2].expert == 3


def test_ranks_need_not_share_heads_that_no_layer_has() -> None:
    from pretrain.engines.megatron.config import transformer_config

    heads = ["model.attention.n_heads=2", "model.attention.n_kv_heads=2"]
    layout = ["parallel.tp=4", "parallel.ep=4", "train.engine=megatron"]
    config = load_config("tiny-hybrid-moe", ["model.layer_pattern=[linear]", *heads, *layout])
    (resolved,) = check_engines(config, 4)
    assert transformer_config(config, resolved).tensor_model_parallel_size == 4


def test_a_router_needs_no_transformer_engine_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import moe_utils

    from pretrain.engines.megatron.cpu import on_any_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
    with on_any_device():
        logits = moe_utils.router_gating_linear(x, weight, None, torch.float32)
    torch.testing.assert_close(logits, x @ weight.T)


def test_an_optimizer_that_counts_steps_together_takes_no_differing_ones() -> None:
    from pretrain.engines.megatron.moments import Moments

    weights = torch.zeros(1), torch.zeros(2)
    # As Transformer Engine's: no AdamW of torch.
    fused = SimpleNamespace(param_groups=[{"params": list(weights)}], state={})
    moments = Moments(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=fused)]))
    moments.set_steps({weight: torch.tensor(3.0) for weight in weights})
    assert [float(moments.step(weight)) for weight in weights] == [3.0, 3.0]
    with pytest.raises(UserError, match="3 steps and others that took 4"):
        moments.set_steps(dict(zip(weights, torch.tensor([3.0, 4.0]), strict=True)))
