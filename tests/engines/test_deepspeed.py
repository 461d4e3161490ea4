"""Our models on DeepSpeed's ZeRO and Ulysses, against our Trainer."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialize
from pretrain.model.transformer import Transformer
from tests.oracle.cases import arguments, split_overrides
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
    "dense": f"{SMALL},model.moe.n_experts=0",
    "dropping": f"{SMALL},model.moe.balance=sequence,model.moe.capacity_factor=1",
}
CASES = {
    "zero1": ("hybrid", ""),
    "zero2-offload": ("dense", ""),
    "zero3-offload": ("softmax", ",parallel.recompute=full,parallel.feed_forward_tile=16"),
    "zero3": ("hybrid", ""),
    "zero2-ulysses": ("softmax", ",parallel.cp=2,parallel.ulysses=2"),
    "zero3-cp": ("dropping", ",parallel.cp=2,parallel.recompute=selective"),
}
RESUMED = {f"{name}-resumed": CASES[name] for name in ("zero1", "zero2-offload", "zero3")}
DENSE = (
    f"{SMALL},model.layer_pattern=[softmax],model.attention.output_gate=false,"
    "model.attention.rope_fraction=1,model.zero_centered_norm=false,model.moe.n_experts=0"
)
OTHERS = {
    # Weights alone, of another stage.
    "zero3-loaded": SMALL,
    "zero3-transformers": DENSE,
    "zero1-bf16": f"{SMALL},train.dtype=bfloat16",
    "zero3-bf16": f"{SMALL},train.dtype=bfloat16",
}
IMPORTED = ["zero1", "zero2-ulysses", "zero3", "zero3-bf16"]
ELASTIC = ["zero1", "zero2-ulysses", "zero3"]
# Of fp32, by which bf16 rounds.
BF16_TOLERANCE = 1e-3


def run(
    ranks: int, script: Path, shards: Path, folder: Path, cases: dict[str, str]
) -> dict[str, dict]:
    run_on_ranks(ranks, script, *arguments(shards, folder, cases))
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


@pytest.fixture(scope="module")
def ours(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(1, OURS, shards, tmp_path_factory.mktemp("ours"), MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def theirs(shards: Path, folder: Path) -> dict[str, dict]:
    cases = {name: MODELS[model] + more for name, (model, more) in (CASES | RESUMED).items()}
    return run(2, THEIRS, shards, folder, cases | OTHERS)


@pytest.fixture(scope="module")
def universal(folder: Path, theirs: dict[str, dict]) -> None:
    """NAME-universal beside the checkpoints of IMPORTED."""
    from deepspeed.checkpoint import ds_to_universal

    for name in IMPORTED:
        source = folder / "checkpoints" / name
        options = Namespace(
            input_folder=str(source / (source / "latest").read_text()),
            output_folder=str(source.with_name(f"{name}-universal")),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        ds_to_universal.main(options)


@pytest.fixture(scope="module")
def alone(shards: Path, folder: Path, universal: None) -> dict[str, dict]:
    """What two ranks have saved, on one."""
    return run(1, THEIRS, shards, folder, {f"{x}-universal": MODELS[CASES[x][0]] for x in ELASTIC})


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_our_trainer(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    reference, found = ours[CASES[name][0]], theirs[name]
    assert found["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
    assert_same(found["gradients"], reference["gradients"])
    assert_same(found["weights"], reference["weights"])


@pytest.mark.parametrize("name", RESUMED)
def test_another_engine_goes_on_from_a_checkpoint(name: str, theirs: dict[str, dict]) -> None:
    whole, resumed = theirs[name.removesuffix("-resumed")], theirs[name]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["norms"] == whole["norms"][2:]
    for weight, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], value), weight
    assert torch.equal(resumed["routers"]["frequencies"], whole["routers"]["frequencies"])


@pytest.mark.parametrize("name", CASES)
def test_an_engine_goes_back_to_a_checkpoint(name: str, theirs: dict[str, dict]) -> None:
    assert theirs[name]["again"] == theirs[name]["losses"][2:]


@pytest.mark.parametrize("name", ELASTIC)
def test_other_ranks_go_on_from_a_universal_checkpoint(
    name: str, ours: dict[str, dict], alone: dict[str, dict]
) -> None:
    model = CASES[name][0]
    found = alone[f"{name}-universal"]
    assert found["losses"] == pytest.approx(ours[model]["losses"][2:], rel=TOLERANCE)
    assert_same(found["weights"], ours[model]["weights"])


@pytest.mark.parametrize("name", [*CASES, "zero1-bf16", "zero3-bf16"])
def test_first_weights_are_those_of_our_trainer(name: str, theirs: dict[str, dict]) -> None:
    model = model_of(MODELS[CASES.get(name, ("hybrid", ""))[0]])
    whole = Transformer(model)
    initialize(whole, model, seed=0)
    for weight, value in whole.state_dict().items():
        assert torch.equal(theirs[name]["first_weights"][weight], value), weight


@pytest.mark.parametrize("name", ["zero1-bf16", "zero3-bf16"])
def test_losses_in_bf16_follow_those_in_fp32(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    found = theirs[name]
    assert found["losses"] == pytest.approx(ours["hybrid"]["losses"], rel=BF16_TOLERANCE)
    # Which bf16 would round.
    assert all(counted.dtype == torch.float32 for counted in found["frequencies"])


def model_of(overrides: str) -> ModelConfig:
    return load_config("tiny-hybrid-moe", split_overrides(overrides)).model


@pytest.mark.parametrize("name", IMPORTED)
@pytest.mark.parametrize("form", ["of ranks", "universal"])
def test_weights_are_imported(
    name: str, form: str, folder: Path, theirs: dict[str, dict], universal: None
) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    source = folder / "checkpoints" / (name if form == "of ranks" else f"{name}-universal")
    model = model_of(MODELS["softmax" if "ulysses" in name else "hybrid"])
    found = import_checkpoint(source, model)
    assert found.weights.keys() == theirs[name]["saved"].keys()
    for weight, value in theirs[name]["saved"].items():
        assert torch.equal(found.weights[weight], value), weight
    assert found.selection_bias is not None
    assert bool(found.selection_bias.any()) == ("ulysses" in name)


def test_weights_of_another_stage_are_taken_over(
    ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    found = theirs["zero3-loaded"]
    assert found["losses"] == pytest.approx(ours["hybrid"]["losses"][2:], rel=TOLERANCE)
    for weight, value in theirs["zero1"]["saved"].items():
        assert torch.equal(found["weights"][weight], value), weight
    assert (
        "saved by 2 ranks with ZeRO stage 1 or 2, and here are 2 with stage 3" in found["refused"]
    )


def test_a_model_of_transformers_is_imported(folder: Path, theirs: dict[str, dict]) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    found, config = theirs["zero3-transformers"], model_of(DENSE)
    model = Transformer(config)
    source = folder / "checkpoints" / "zero3-transformers"
    model.load_state_dict(import_checkpoint(source, config).weights)
    torch.testing.assert_close(model(found["tokens"]).value, found["logits"])


@pytest.mark.parametrize(
    ("path", "overrides", "reason"),
    [
        ("nothing", SMALL, "neither a file `latest`"),
        ("zero1", f"{SMALL},model.n_layers=8", "weights are missing: layers.4"),
        ("zero1", f"{SMALL},model.d_ff=48,model.vocab_size=512", "embedding.weight has 65536 elem"),
    ],
)
def test_what_is_no_checkpoint_of_the_model_is_refused(
    path: str, overrides: str, reason: str, folder: Path, theirs: dict[str, dict]
) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    with pytest.raises(UserError, match=reason):
        import_checkpoint(folder / "checkpoints" / path, model_of(overrides))
