"""Our models on DeepSpeed's ZeRO and Ulysses, against our Trainer."""

from pathlib import Path

import pytest
import torch

from tests.oracle.cases import arguments
from tests.oracle.compare import TOLERANCE, assert_same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

OURS = Path(__file__).parents[1] / "oracle" / "our_cases.py"
THEIRS = Path(__file__).with_name("deepspeed_cases.py")
SMALL = (
    "model.vocab_size=1024,model.d_model=64,model.d_ff=96,model.attention.head_dim=16,"
    "model.linear.key_dim=16,model.linear.value_dim=16,model.moe.d_expert=32,"
    "model.moe.d_shared_expert=32,data.seq_len=64,train.global_batch=4,train.microbatch=1,"
    "optim.clip=0.5"
)
MODELS = {
    "hybrid": SMALL,
    "softmax": f"{SMALL},model.layer_pattern=[softmax,sliding],model.attention.window=9,"
    "model.moe.balance=bias,model.moe.bias_rate=0.01,model.tie_embeddings=true",
}
CASES = {
    "zero1": ("hybrid", ""),
    "zero2-offload": ("hybrid", ""),
    "zero3-offload": ("softmax", ",parallel.recompute=full"),
    "zero3": ("hybrid", ""),
    "zero2-ulysses": ("softmax", ",parallel.cp=2,parallel.ulysses=2"),
    "zero3-cp": ("hybrid", ",parallel.cp=2"),
}


def run(
    ranks: int, script: Path, shards: Path, folder: Path, cases: dict[str, str]
) -> dict[str, dict]:
    run_on_ranks(ranks, script, *arguments(shards, folder, cases))
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


@pytest.fixture(scope="module")
def ours(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(1, OURS, shards, tmp_path_factory.mktemp("ours"), MODELS)


@pytest.fixture(scope="module")
def theirs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    cases = {name: MODELS[model] + more for name, (model, more) in CASES.items()}
    return run(2, THEIRS, shards, tmp_path_factory.mktemp("deepspeed"), cases)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_our_trainer(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    reference, found = ours[CASES[name][0]], theirs[name]
    assert found["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
    assert_same(found["gradients"], reference["gradients"])
    assert_same(found["weights"], reference["weights"])
