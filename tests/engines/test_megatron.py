"""Our models in megatron-core, on its parallelism and its optimizer, against our Trainer."""

from pathlib import Path

import pytest
import torch

from pretrain.config import load_config
from pretrain.model.init import initialize
from pretrain.model.transformer import Transformer
from tests.oracle.cases import arguments, split_overrides
from tests.oracle.compare import TOLERANCE, assert_same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

OURS = Path(__file__).parents[1] / "oracle" / "our_cases.py"
THEIRS = Path(__file__).with_name("megatron_cases.py")
SMALL = (
    "model.vocab_size=1024,model.d_model=64,model.d_ff=96,model.attention.head_dim=16,"
    "model.linear.key_dim=16,model.linear.value_dim=16,model.moe.d_expert=32,"
    "model.moe.d_shared_expert=32,data.seq_len=64,train.global_batch=4,train.microbatch=1"
)
MODELS = {
    "hybrid": SMALL,
    "dense": f"{SMALL},model.moe.n_experts=0,model.tie_embeddings=true",
    "softmax": f"{SMALL},model.layer_pattern=[softmax,sliding],model.attention.window=9,"
    "model.attention.output_gate=false,model.zero_centered_norm=false,"
    "model.moe.d_shared_expert=0",
}
LAYOUTS = {
    "tp2": ("dense", "parallel.tp=2"),
    "pp2": ("dense", "parallel.pp=2"),
    "pp2-interleaved": ("hybrid", "parallel.pp=2,parallel.pipeline.schedule=interleaved"),
    "ep2": ("hybrid", "parallel.ep=2"),
    "tp2-ep2-resumed": ("hybrid", "parallel.tp=2,parallel.ep=2"),
    "cp2-softmax": ("softmax", "parallel.cp=2"),
    "cp2-hybrid": ("hybrid", "parallel.cp=2,parallel.recompute=full"),
}


# Of fp32, by which bf16 rounds.
BF16 = {"tp2-ep2-bf16": ("hybrid", "parallel.tp=2,parallel.ep=2,train.dtype=bfloat16")}
BF16_TOLERANCE = 1e-3
# In the one layout, from what the other has saved.
LOADED = {"pp2-loaded": ("hybrid", "parallel.pp=2")}


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
    layouts = LAYOUTS | BF16 | LOADED
    cases = {name: f"{MODELS[model]},{layout}" for name, (model, layout) in layouts.items()}
    return run(2, THEIRS, shards, tmp_path_factory.mktemp("megatron"), cases)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_gradients_and_weights_are_those_of_our_trainer(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    reference, found = ours[LAYOUTS[name][0]], theirs[name]
    first = 1 if name.endswith("resumed") else 0
    assert found["losses"] == pytest.approx(reference["losses"][first:], rel=TOLERANCE)
    if first == 0:
        assert_same(found["gradients"], reference["gradients"])
    assert_same(found["weights"], reference["weights"])


def test_losses_in_bf16_follow_those_in_fp32(
    ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    losses = theirs["tp2-ep2-bf16"]["losses"]
    assert losses == pytest.approx(ours["hybrid"]["losses"], rel=BF16_TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS | BF16 | LOADED)
def test_weights_come_back_as_they_were(name: str, theirs: dict[str, dict]) -> None:
    model, layout = (LAYOUTS | BF16 | LOADED)[name]
    config = load_config("tiny-hybrid-moe", split_overrides(f"{MODELS[model]},{layout}")).model
    whole = Transformer(config)
    initialize(whole, config, seed=0)
    found = theirs[name]["first_weights"]
    assert found.keys() == whole.state_dict().keys()
    for weight, value in whole.state_dict().items():
        assert torch.equal(found[weight], value), weight


def test_one_layout_loads_what_another_has_saved(theirs: dict[str, dict]) -> None:
    saved, loaded = (theirs[name]["weights"] for name in ("tp2-ep2-resumed", "pp2-loaded"))
    assert loaded.keys() == saved.keys()
    for weight, value in saved.items():
        assert torch.equal(loaded[weight], value), weight


def test_whole_weights_are_taken_over(theirs: dict[str, dict]) -> None:
    before, after = theirs["pp2-loaded"]["first_weights"], theirs["pp2-loaded"]["negated"]
    assert after.keys() == before.keys()
    for weight, value in before.items():
        assert torch.equal(after[weight], -value), weight


def test_stacked_layers_of_a_foreign_checkpoint_are_read(theirs: dict[str, dict]) -> None:
    saved, loaded = (theirs["cp2-softmax"][which] for which in ("weights", "reloaded"))
    assert loaded.keys() == saved.keys()
    for weight, value in saved.items():
        assert torch.equal(loaded[weight], value), weight


def test_what_is_no_checkpoint_of_the_model_is_refused(theirs: dict[str, dict]) -> None:
    no_checkpoint, of_another_model = theirs["cp2-softmax"]["refused"]
    assert "no metadata.json" in no_checkpoint
    assert "are not there, decoder.layers.0.self_attention" in of_another_model
