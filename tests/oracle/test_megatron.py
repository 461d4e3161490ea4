"""Our tensor, expert and pipeline parallelism against megatron-core's, and our context parallelism
against no parallelism of the model, and inside megatron-core.
"""

from pathlib import Path

import pytest
import torch

from parallel.layout import split_row
from tests.oracle.cases import arguments
from tests.oracle.compare import TOLERANCE, assert_same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

OURS = Path(__file__).with_name("our_cases.py")
THEIRS = Path(__file__).with_name("megatron_cases.py")
SEQ_LEN = 64
# What both can express: all layers softmax, no output gate, no shared expert, plain norms.
COMMON = (
    "model.layer_pattern=[softmax],model.zero_centered_norm=false,model.vocab_size=1024,"
    "model.d_model=64,model.d_ff=96,model.attention.n_heads=8,model.attention.n_kv_heads=4,"
    "model.attention.head_dim=16,model.attention.rope_fraction=1.0,"
    "model.attention.output_gate=false,model.moe.d_shared_expert=0,model.moe.aux_loss=0,"
    f"data.seq_len={SEQ_LEN}"
)
DENSE = "model.moe.n_experts=0"
TIED = f"{DENSE},model.tie_embeddings=true"
# Tensor parallelism is with sequence parallelism on both sides. Experts are never split by tp:
# without ep, megatron-core 0.16.1 then leaves each rank of tp its own part of their gradient.
LAYOUTS = {
    "tp2": f"{DENSE},parallel.tp=2",
    "tp2-tied": f"{TIED},parallel.tp=2",
    "pp2-1f1b": f"{DENSE},parallel.pp=2",
    "pp2-1f1b-tied": f"{TIED},parallel.pp=2",
    "moe-ep2": "parallel.ep=2",
    "moe-ep2-tp2": "parallel.ep=2,parallel.tp=2",
    "moe-pp2-1f1b": "parallel.pp=2",
    "dp2": DENSE,
    # Without Transformer Engine megatron-core refuses cp: there its attention is our ring.
    "cp2": f"{DENSE},parallel.cp=2",
    "moe-ep2-cp2": "parallel.ep=2,parallel.cp=2",
}
# Of the same model and batch with megatron-core's own attention.
STOCK_ATTENTION = {"cp2": "dp2", "moe-ep2-cp2": "moe-ep2"}


def run(script: Path, shards: Path, folder: Path) -> dict[str, dict]:
    cases = {name: f"{COMMON},{layout}" for name, layout in LAYOUTS.items()}
    run_on_ranks(2, script, *arguments(shards, folder, cases))
    return {name: torch.load(folder / f"{name}.pt") for name in LAYOUTS}


@pytest.fixture(scope="module")
def ours(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(OURS, shards, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(THEIRS, shards, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_are_those_of_megatron_core(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    assert ours[name]["losses"][0] == pytest.approx(theirs[name]["loss"], rel=TOLERANCE)
    assert_same(ours[name]["gradients"], theirs[name]["gradients"])


@pytest.mark.parametrize("ring", STOCK_ATTENTION)
def test_our_ring_is_the_attention_of_megatron_core(ring: str, theirs: dict[str, dict]) -> None:
    stock = theirs[STOCK_ATTENTION[ring]]
    assert theirs[ring]["loss"] == pytest.approx(stock["loss"], rel=TOLERANCE)
    assert_same(theirs[ring]["gradients"], stock["gradients"])


def test_a_row_of_one_document_lies_as_in_megatron_core(theirs: dict[str, dict]) -> None:
    layout = split_row([SEQ_LEN], 2)
    for rank, tokens in enumerate(theirs["cp2"]["tokens_of_ranks"]):
        assert tokens.tolist() == layout.tokens_of(rank).tolist()
