"""Our models in megatron-core, on its parallelism and its optimizer, against the native engine."""

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.index import Index
from pretrain.checkpoint.manifest import index_name
from pretrain.checkpoint.reader import read_tensors
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.tensor_file import DTYPES
from pretrain.config import load_config
from pretrain.model.init import initialize
from pretrain.model.transformer import Transformer
from tests.oracle.cases import arguments, split_overrides
from tests.oracle.compare import TOLERANCE, assert_same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

CASES = Path(__file__).with_name("megatron_cases.py")
STEPS, SAVED, RESUMED = 10, 3, 6
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
NATIVE = {f"native-{model}": (model, "train.seed=0") for model in MODELS}
MEGATRON = {
    "tp2": ("dense", "parallel.tp=2"),
    "pp2": ("dense", "parallel.pp=2"),
    "ep2": ("hybrid", "parallel.ep=2"),
    "tp2-ep2": ("hybrid", "parallel.tp=2,parallel.ep=2"),
    "pp2-interleaved": ("hybrid", "parallel.pp=2,parallel.pipeline.schedule=interleaved"),
    "cp2-softmax": ("softmax", "parallel.cp=2"),
    "cp2-hybrid": ("hybrid", "parallel.cp=2,parallel.recompute=full"),
    "tp2-ep2-bf16": ("hybrid", "parallel.tp=2,parallel.ep=2,train.dtype=bfloat16"),
}
ON_FOUR_RANKS = {"pp2-tp2-ep2": ("hybrid", "parallel.pp=2,parallel.tp=2,parallel.ep=2")}
ALL = MEGATRON | ON_FOUR_RANKS
IN_FP32 = [name for name in ALL if not name.endswith("bf16")]
# Of fp32, by which bf16 rounds.
BF16_TOLERANCE, BF16_TOLERANCE_OF_NORMS = 1e-3, 1e-2
# Which case goes on from what another has saved.
SWITCHES = [
    ("tp2", "native-dense"),
    ("pp2-interleaved", "native-hybrid"),
    ("tp2-ep2", "native-hybrid"),
    ("tp2-ep2-bf16", "native-hybrid"),
    ("cp2-softmax", "native-softmax"),
    ("pp2", "tp2"),
    ("ep2", "tp2-ep2"),
    ("native-dense", "pp2"),
    ("native-hybrid", "tp2-ep2"),
]


def run(
    ranks: int, script: Path, shards: Path, folder: Path, cases: dict[str, str]
) -> dict[str, dict]:
    run_on_ranks(ranks, script, *arguments(shards, folder, cases))
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in cases}


def overrides(name: str) -> str:
    model, layout = (NATIVE | ALL)[name]
    engine = "native" if name in NATIVE else "megatron"
    return f"{MODELS[model]},{layout},train.engine={engine}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def found(shards: Path, folder: Path) -> dict[str, dict]:
    """What all cases, and all switches from one to another, have found."""
    cases = {name: overrides(name) for name in NATIVE | MEGATRON}
    cases |= {f"{to}<{source}": overrides(to) for to, source in SWITCHES}
    of_four = {name: overrides(name) for name in ON_FOUR_RANKS}
    return run(2, CASES, shards, folder, cases) | run(4, CASES, shards, folder, of_four)


def column(steps: list[dict[str, Any]], key: str) -> list[Any]:
    return [step[key] for step in steps]


def native_of(name: str) -> str:
    return f"native-{(NATIVE | ALL)[name][0]}"


def read(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    target = Target(str(checkpoint))
    index = Index.from_bytes((target / index_name(0)).read())
    into = {x.name: torch.empty(x.shape, dtype=DTYPES[x.dtype]) for x in index.tensors}
    read_tensors(target, index, into)
    return into


@pytest.mark.parametrize("name", IN_FP32)
def test_losses_and_norms_are_those_of_the_native_engine(name: str, found: dict[str, dict]) -> None:
    ours, theirs = (found[which]["steps"] for which in (native_of(name), name))
    assert len(theirs) == STEPS
    for key in ("loss", "norm", "aux_loss", "z_loss", "router_entropy"):
        assert column(theirs, key) == pytest.approx(column(ours, key), rel=TOLERANCE), key
    # Before the first update nothing but the order of sums differs.
    assert theirs[0]["norm"] == pytest.approx(ours[0]["norm"], rel=1e-6)
    assert theirs[0]["norms"] == pytest.approx(ours[0]["norms"], rel=1e-5)


@pytest.mark.parametrize("name", IN_FP32)
def test_what_steps_measure_counts_every_token_once(name: str, found: dict[str, dict]) -> None:
    for ours, theirs in zip(found[native_of(name)]["steps"], found[name]["steps"], strict=True):
        assert theirs["loss_tokens"] == ours["loss_tokens"]
        for key in ("by_source", "by_position"):
            assert column_of(theirs[key], 1) == column_of(ours[key], 1)
            for mine, other in zip(theirs[key], ours[key], strict=True):
                assert isnan(other[0]) or mine[0] == pytest.approx(other[0], rel=TOLERANCE)
        assert torch.equal(theirs["expert_counts"].sum(-1), ours["expert_counts"].sum(-1))
        assert not theirs["dropped"].any()
        ranks = 4 if name in ON_FOUR_RANKS else 2
        assert theirs["numbers"] == [ranks, ranks * 0.1]
    first = found[native_of(name)]["steps"][0]["expert_counts"]
    assert torch.equal(found[name]["steps"][0]["expert_counts"], first)


def column_of(parts: list[Any], number: int) -> list[Any]:
    return [part[number] for part in parts]


@pytest.mark.parametrize("name", IN_FP32)
def test_what_is_saved_is_what_the_native_engine_saves(
    name: str, found: dict[str, dict], folder: Path
) -> None:
    assert found[name]["steps"]
    ours, theirs = read(folder / native_of(name)), read(folder / name)
    assert theirs.keys() == ours.keys()
    assert {key: x.dtype for key, x in theirs.items()} == {key: x.dtype for key, x in ours.items()}
    assert all(torch.equal(x, ours[key]) for key, x in theirs.items() if key.endswith(".step"))
    assert_same(but_zeros(theirs), but_zeros(ours))


def but_zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selection biases are zero, and so are weights of a kind before they are updated."""
    return {name: x for name, x in tensors.items() if name != "routers.selection_bias"}


@pytest.mark.parametrize("name", ALL)
def test_a_fresh_engine_goes_on_bit_for_bit(name: str, found: dict[str, dict]) -> None:
    for key in ("loss", "norm", "aux_loss"):
        assert column(found[name]["resumed"], key) == column(
            found[name]["steps"][SAVED:RESUMED], key
        )


@pytest.mark.parametrize(("name", "source"), SWITCHES)
def test_a_run_goes_on_under_another_layout_or_engine(
    name: str, source: str, found: dict[str, dict]
) -> None:
    went_on, left = found[f"{name}<{source}"]["steps"], found[source]["steps"][SAVED:RESUMED]
    tolerance = BF16_TOLERANCE if name.endswith("bf16") else TOLERANCE
    assert column(went_on, "loss") == pytest.approx(column(left, "loss"), rel=tolerance)


def test_losses_in_bf16_follow_those_in_fp32(found: dict[str, dict]) -> None:
    in_bf16, in_fp32 = (found[name]["steps"] for name in ("tp2-ep2-bf16", "tp2-ep2"))
    for key, tolerance in (("loss", BF16_TOLERANCE), ("norm", BF16_TOLERANCE_OF_NORMS)):
        assert column(in_bf16, key) == pytest.approx(column(in_fp32, key), rel=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_whole_weights_are_those_that_every_engine_starts_from(
    name: str, found: dict[str, dict]
) -> None:
    config = load_config("tiny-hybrid-moe", split_overrides(overrides(name))).model
    whole = Transformer(config)
    initialize(whole, config, seed=0)
    weights = found[name]["first_weights"]
    assert weights.keys() == whole.state_dict().keys()
    for weight, value in whole.state_dict().items():
        assert torch.equal(weights[weight], value), weight


@pytest.mark.parametrize("name", ["tp2-ep2", "pp2-interleaved", "cp2-softmax"])
def test_whole_weights_are_taken_over(name: str, found: dict[str, dict]) -> None:
    before, after = found[name]["saved"], found[name]["negated"]
    assert after.keys() == before.keys()
    for weight, value in before.items():
        assert torch.equal(after[weight], -value), weight


@pytest.mark.parametrize(
    ("saver", "loader"),
    # One layout loads what another has saved; and layers that a user of theirs has saved stacked.
    [("tp2-ep2", "pp2-interleaved"), ("cp2-softmax", "cp2-softmax")],
)
def test_their_checkpoints_are_read(saver: str, loader: str, found: dict[str, dict]) -> None:
    saved, loaded = found[saver]["saved"], found[loader]["loaded"]
    assert loaded.keys() == saved.keys()
    for weight, value in saved.items():
        assert torch.equal(loaded[weight], value), weight


def test_what_is_no_checkpoint_of_the_model_is_refused(found: dict[str, dict]) -> None:
    no_checkpoint, of_another_model = found["cp2-softmax"]["refused"]
    assert "no metadata.json" in no_checkpoint
    assert "are not there, decoder.layers.0.self_attention" in of_another_model
