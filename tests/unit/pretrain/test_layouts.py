"""Every layout that cannot run is refused with the reason, and with one that can."""

import re

import pytest

from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout

PIPELINE = "parallel.pipeline"
REFUSALS = [
    (6, ["parallel.tp=4"], "pp x dp_replicate x cp x tp = 4 does not divide the number of ranks"),
    (4, ["parallel.dp_shard=2"], "x tp = 2, but there are 4 ranks"),
    (2, ["parallel.cp=2", "data.seq_len=255"], "cp x tp = 2 x 1 does not divide data.seq_len"),
    (4, ["parallel.tp=4", "data.seq_len=254"], "x tp = 1 x 4 does not divide data.seq_len = 254"),
    (2, ["parallel.ulysses=2"], "ulysses = 2 does not divide parallel.cp = 1"),
    (
        16,
        ["parallel.cp=8", "parallel.tp=2", "parallel.ulysses=4"],
        "ulysses = 4 does not divide the 2 heads of a rank of tp",
    ),
    (
        6,
        [
            "parallel.cp=6",
            "parallel.ulysses=3",
            "data.seq_len=264",
            "model.attention.n_heads=6",
            "model.attention.n_kv_heads=2",
        ],
        "ulysses = 3 is neither a divisor nor a multiple of the 2 key heads",
    ),
    (2, ["parallel.tp=2", "model.vocab_size=2049"], "tp = 2 does not divide model.vocab_size"),
    (8, ["parallel.tp=8"], "tp = 8 does not divide model.attention.n_heads = 4"),
    (
        8,
        ["parallel.tp=8", "model.layer_pattern=[linear]"],
        "tp = 8 does not divide model.linear.n_value_heads = 4",
    ),
    (
        8,
        ["parallel.tp=8", "model.layer_pattern=[linear, sliding]"],
        "tp = 8 does not divide model.attention.n_heads = 4",
    ),
    (
        2,
        ["parallel.tp=2", "model.moe.d_shared_expert=33"],
        "tp = 2 does not divide model.moe.d_shared_expert = 33",
    ),
    (
        2,
        ["parallel.tp=2", "model.moe.n_experts=0", "model.d_ff=33"],
        "tp = 2 does not divide model.d_ff = 33",
    ),
    (
        2,
        ["parallel.tp=2", "model.attention.n_kv_heads=3", "model.attention.n_heads=6"],
        "neither a divisor nor a multiple of model.attention.n_kv_heads = 3",
    ),
    (
        2,
        [
            "parallel.tp=2",
            "model.layer_pattern=[sliding]",
            "model.attention.n_kv_heads=3",
            "model.attention.n_heads=6",
        ],
        "neither a divisor nor a multiple of model.attention.n_kv_heads = 3",
    ),
    (
        2,
        ["parallel.tp=2", "model.linear.n_key_heads=3", "model.linear.n_value_heads=6"],
        "neither a divisor nor a multiple of model.linear.n_key_heads = 3",
    ),
    (2, ["parallel.ep=2", "model.moe.n_experts=0"], "ep = 2, but the model is dense"),
    (4, ["parallel.ep=4", "parallel.dp_replicate=2"], "ep = 4 does not divide dp_shard x cp x tp"),
    (4, ["parallel.ep=4", "model.moe.n_experts=6"], "ep = 4 does not divide model.moe.n_experts"),
    (
        6,
        ["parallel.ep=2", "model.d_model=128", "train.global_batch=12"],
        "3 ranks share each expert, and do not divide model.d_model = 128",
    ),
    (
        6,
        ["parallel.ep=2", "model.d_model=96", "model.moe.d_expert=32", "train.global_batch=12"],
        "do not divide model.moe.d_expert x 2 = 64",
    ),
    (2, ["train.global_batch=6"], "train.global_batch = 6 is no multiple of dp_replicate x"),
    (4, ["parallel.pp=4", "train.global_batch=6"], "schedule = 1f1b needs a microbatch per rank"),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.schedule=dualpipev", "train.global_batch=6"],
        "schedule = dualpipev needs a microbatch per stage",
    ),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.schedule=interleaved", "train.global_batch=10"],
        "schedule = interleaved takes microbatches in 2 equal rounds",
    ),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.schedule=gpipe", f"{PIPELINE}.stages_per_rank=2"],
        "schedule = gpipe has one stage per rank",
    ),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.schedule=zbv", f"{PIPELINE}.stages_per_rank=1"],
        "schedule = zbv has two stages per rank",
    ),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.schedule=interleaved", f"{PIPELINE}.stages_per_rank=1"],
        "schedule = interleaved needs two stages per rank or more",
    ),
    (8, ["parallel.pp=8"], "model.n_layers = 4 are fewer than the pipeline's 8 stages"),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.layers_per_stage=[1, 1, 2]"],
        "layers_per_stage = [1, 1, 2] has 3 entries for 2 stages",
    ),
    (
        2,
        ["parallel.pp=2", f"{PIPELINE}.layers_per_stage=[2, 3]"],
        "layers_per_stage = [2, 3] adds up to 5",
    ),
    (
        4,
        ["parallel.pp=4", f"{PIPELINE}.layers_per_stage=[2, 0, 1, 1]"],
        "only the first stage (embedding) and the last (head) can have no layer",
    ),
]


@pytest.mark.parametrize(("ranks", "overrides", "reason"), REFUSALS)
def test_a_refusal_names_the_reason_and_a_layout_that_works(
    ranks: int, overrides: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match="layout refused") as refusal:
        resolve_layout(load_config("tiny-hybrid-moe", overrides), ranks)
    message = str(refusal.value)
    assert reason in message

    nearest = message.partition("Nearest that works")[2]
    axes = [
        f"parallel.{axis}" for axis in re.findall(r"\b[a-z_]+=\d+", nearest.partition("with")[0])
    ]
    batch = re.findall(r"train\.global_batch=\d+", nearest)
    resolve_layout(load_config("tiny-hybrid-moe", [*overrides, *axes, *batch]), ranks)
