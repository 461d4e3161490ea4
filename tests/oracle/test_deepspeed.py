"""Our sharding of weights, gradients and optimizer state against DeepSpeed's ZeRO."""

from pathlib import Path

import pytest
import torch

from tests.oracle.cases import arguments
from tests.oracle.compare import TOLERANCE, assert_same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

OURS = Path(__file__).with_name("our_cases.py")
THEIRS = Path(__file__).with_name("deepspeed_cases.py")
# The whole architecture in small. Balance loss and schedule are ours, and not what is compared.
CASE = (
    "model.vocab_size=1024,model.d_model=64,model.linear.key_dim=16,model.linear.value_dim=16,"
    "model.attention.head_dim=16,model.moe.d_expert=32,model.moe.d_shared_expert=32,"
    "model.moe.aux_loss=0,data.seq_len=64,schedule.name=constant,schedule.warmup_steps=0,"
    "optim.clip=0.5"
)
STAGES = ["zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def ours(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ours")
    run_on_ranks(2, OURS, *arguments(shards, folder, {"fsdp2": f"{CASE},parallel.dp_shard=2"}))
    return torch.load(folder / "fsdp2.pt")


@pytest.fixture(scope="module")
def theirs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("zero")
    run_on_ranks(2, THEIRS, *arguments(shards, folder, dict.fromkeys(STAGES, CASE)))
    return {stage: torch.load(folder / f"{stage}.pt") for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_fsdp_is_zero(stage: str, ours: dict, theirs: dict[str, dict]) -> None:
    zero = theirs[stage]
    assert ours["losses"] == pytest.approx(zero["losses"], rel=TOLERANCE)
    assert_same(ours["gradients"], zero["gradients"])
    assert_same(ours["weights"], zero["weights"])
