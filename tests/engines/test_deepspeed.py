"""DeepSpeed's ZeRO and Ulysses as an engine, against the native one."""

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

SCRIPT = Path(__file__).with_name("deepspeed_cases.py")
AGAIN, NUMBER = slice(3, 6), 2.0**40
SMALL = (
    "model.vocab_size=1024,model.d_model=64,model.d_ff=96,model.attention.head_dim=16,"
    "model.linear.key_dim=16,model.linear.value_dim=16,model.moe.d_expert=32,"
    "model.moe.d_shared_expert=32,data.seq_len=32,train.global_batch=6,train.microbatch=1,"
    "train.dtype=float32,optim.clip=0.5"
)
MODELS = {
    "hybrid": SMALL,
    "softmax": f"{SMALL},model.layer_pattern=[softmax,sliding],model.attention.window=9,"
    "model.moe.balance=bias,model.moe.bias_rate=0.01,model.tie_embeddings=true",
    "dense": f"{SMALL},model.moe.n_experts=0",
    "dropping": f"{SMALL},model.moe.balance=sequence,model.moe.capacity_factor=1",
}
ZERO = "train.engine=deepspeed,parallel.zero.stage="
# By default all weights of a small model would stay whole on every rank.
ZERO3 = f"{ZERO}3,parallel.zero.persistence_threshold=0"
OFFLOAD = ",parallel.zero.offload_optimizer=true"
CASES = {
    "zero1": ("hybrid", f"{ZERO}1"),
    "zero1-offload": ("dense", f"{ZERO}1{OFFLOAD}"),
    "zero2-offload": ("dense", f"{ZERO}2{OFFLOAD}"),
    "zero3-offload": (
        "softmax",
        f"{ZERO3}{OFFLOAD},parallel.zero.offload_parameters=true,parallel.recompute=full,"
        "parallel.feed_forward_tile=16",
    ),
    "zero3": ("hybrid", ZERO3),
    "zero2-ulysses": ("softmax", f"{ZERO}2,parallel.cp=2,parallel.ulysses=2"),
    "zero3-cp": ("dropping", f"{ZERO3},parallel.cp=2,parallel.recompute=selective"),
}
BF16 = {
    "zero1-bf16": ("hybrid", f"{ZERO}1,train.dtype=bfloat16"),
    "zero2-offload-bf16": ("hybrid", f"{ZERO}2{OFFLOAD},train.dtype=bfloat16"),
    "zero3-offload-bf16": (
        "hybrid",
        f"{ZERO3}{OFFLOAD},parallel.zero.offload_parameters=true,train.dtype=bfloat16",
    ),
    "zero3-bf16": ("hybrid", f"{ZERO3},train.dtype=bfloat16"),
}
# Engine, model and checkpoint that it goes on from, on two ranks.
SAME = {f"{name}-from-{name}": CASES[name] for name in ("zero1", "zero2-offload", "zero3")} | {
    f"{name}-from-{name}": BF16[name] for name in ("zero1-bf16", "zero3-bf16")
}
THEIRS = {"zero3-from-their-zero3": CASES["zero3"], "zero3-from-their-zero1": CASES["zero3"]}
OTHERS = {
    "zero3-from-zero1": CASES["zero3"],
    "zero1-from-native-hybrid": CASES["zero1"],
    "zero3-offload-from-native-softmax": CASES["zero3-offload"],
    # Weights that stay whole on every rank.
    "whole-from-zero1-bf16": ("hybrid", "train.engine=deepspeed"),
}
ON_THREE_RANKS = {"three-from-zero1": CASES["zero3"], "three-from-zero3": CASES["zero1"]}
ON_ONE_RANK = {
    "native-from-zero3": ("hybrid", ""),
    "native-from-zero3-offload": ("softmax", ""),
    "zero1-from-their-zero1-universal": CASES["zero1"],
    "zero3-from-their-zero3-universal": CASES["zero3"],
}
DENSE = (
    f"{SMALL},model.layer_pattern=[softmax],model.attention.output_gate=false,"
    "model.attention.rope_fraction=1,model.zero_centered_norm=false,model.moe.n_experts=0"
)
IMPORTED = ["zero1", "zero2-ulysses", "zero3", "zero3-bf16"]
# Of fp32, by which bf16 rounds.
BF16_TOLERANCE, BF16_TOLERANCE_OF_NORMS = 1e-3, 1e-2


def run(
    ranks: int, shards: Path, folder: Path, cases: dict[str, tuple[str, str]]
) -> dict[str, dict]:
    settings = {
        name: f"{MODELS[model]},{more}".rstrip(",") for name, (model, more) in cases.items()
    }
    run_on_ranks(ranks, SCRIPT, *arguments(shards, folder, settings))
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def ours(shards: Path, folder: Path) -> dict[str, dict]:
    found = run(1, shards, folder, {f"native-{model}": (model, "") for model in MODELS})
    return {name.removeprefix("native-"): result for name, result in found.items()}


@pytest.fixture(scope="module")
def theirs(shards: Path, folder: Path, ours: dict[str, dict]) -> dict[str, dict]:
    return run(2, shards, folder, CASES | BF16 | SAME | THEIRS | OTHERS)


@pytest.fixture(scope="module")
def universal(folder: Path, theirs: dict[str, dict]) -> None:
    """their-NAME-universal beside the checkpoints of IMPORTED."""
    from deepspeed.checkpoint import ds_to_universal

    for name in IMPORTED:
        source = folder / "checkpoints" / f"their-{name}"
        options = Namespace(
            input_folder=str(source / (source / "latest").read_text()),
            output_folder=str(source.with_name(f"their-{name}-universal")),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        ds_to_universal.main(options)


@pytest.fixture(scope="module")
def alone(shards: Path, folder: Path, universal: None) -> dict[str, dict]:
    return run(1, shards, folder, ON_ONE_RANK)


@pytest.fixture(scope="module")
def three(shards: Path, folder: Path, theirs: dict[str, dict]) -> dict[str, dict]:
    return run(3, shards, folder, ON_THREE_RANKS)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_the_native_engine(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    reference, found = ours[CASES[name][0]], theirs[name]
    assert found["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(reference["norms"], rel=TOLERANCE)
    assert_same(found["gradients"], reference["gradients"])
    assert_same(found["saved"], reference["saved"])
    assert torch.equal(found["routers"]["selection_bias"], reference["routers"]["selection_bias"])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_measures_what_it_does_natively(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    reference, found = ours[CASES[name][0]]["measured"], theirs[name]["measured"]
    assert found["loss_tokens"] == reference["loss_tokens"]
    for by in ("by_source", "by_position"):
        for (loss, tokens), (wanted, wanted_tokens) in zip(found[by], reference[by], strict=True):
            assert tokens == wanted_tokens
            assert loss == pytest.approx(wanted, rel=TOLERANCE, nan_ok=True)
    for part in ("aux_loss", "z_loss", "router_entropy"):
        assert found[part] == pytest.approx(reference[part], rel=TOLERANCE)
    assert torch.equal(found["expert_counts"], reference["expert_counts"])
    assert torch.equal(found["dropped"], reference["dropped"])
    assert bool(found["dropped"].any()) == (name == "zero3-cp")
    assert found["numbers"] == [2 * NUMBER + 1]


def test_each_rank_may_see_its_own_gpu_alone() -> None:
    run_on_ranks(2, SCRIPT.with_name("gpu_of_task.py"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_keep_what_the_stage_leaves_them(name: str, theirs: dict[str, dict]) -> None:
    assert theirs[name]["stored"] == (1 if "zero3" in name else 2)


@pytest.mark.parametrize("name", SAME)
def test_another_engine_goes_on_from_a_checkpoint(name: str, theirs: dict[str, dict]) -> None:
    assert_goes_on(theirs[name], theirs[name.partition("-from-")[0]])


def test_an_engine_goes_on_from_a_checkpoint_of_deepspeed(theirs: dict[str, dict]) -> None:
    assert_goes_on(theirs["zero3-from-their-zero3"], theirs["zero3"])
    assert (
        "saved by 2 ranks with ZeRO stage 1 or 2, and here are 2 with stage 3"
        in theirs["zero3-from-their-zero1"]["refused"]
    )


def assert_goes_on(resumed: dict, whole: dict) -> None:
    """With the same bits, for three steps."""
    assert resumed["losses"] == whole["losses"][AGAIN]
    assert resumed["norms"] == whole["norms"][AGAIN]
    for weight, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], value), weight
    for name, value in whole["routers"].items():
        assert torch.equal(resumed["routers"][name], value), name


@pytest.mark.parametrize("name", [*CASES, *BF16])
def test_an_engine_whose_state_is_lost_goes_back_to_a_checkpoint(
    name: str, theirs: dict[str, dict]
) -> None:
    assert_goes_on(theirs[name]["again"], theirs[name])


@pytest.mark.parametrize("name", OTHERS | ON_THREE_RANKS | ON_ONE_RANK)
def test_others_go_on_from_a_checkpoint(
    name: str,
    ours: dict[str, dict],
    theirs: dict[str, dict],
    three: dict[str, dict],
    alone: dict[str, dict],
) -> None:
    found = (theirs | three | alone)[name]
    reference = ours[(OTHERS | ON_THREE_RANKS | ON_ONE_RANK)[name][0]]
    tolerance = BF16_TOLERANCE if "bf16" in name else TOLERANCE
    assert found["losses"] == pytest.approx(reference["losses"][AGAIN], rel=tolerance)
    assert found["norms"] == pytest.approx(reference["norms"][AGAIN], rel=5 * tolerance)


@pytest.mark.parametrize("name", [*CASES, *BF16])
def test_first_weights_are_those_of_the_native_engine(name: str, theirs: dict[str, dict]) -> None:
    model = model_of(MODELS[(CASES | BF16)[name][0]])
    whole = Transformer(model)
    initialize(whole, model, seed=0)
    for weight, value in whole.state_dict().items():
        assert torch.equal(theirs[name]["first_weights"][weight], value), weight


@pytest.mark.parametrize("name", BF16)
def test_losses_in_bf16_follow_those_in_fp32(
    name: str, ours: dict[str, dict], theirs: dict[str, dict]
) -> None:
    found, reference = theirs[name], ours["hybrid"]
    assert found["losses"] == pytest.approx(reference["losses"], rel=BF16_TOLERANCE)
    assert found["norms"] == pytest.approx(reference["norms"], rel=BF16_TOLERANCE_OF_NORMS)


def model_of(overrides: str) -> ModelConfig:
    return load_config("tiny-hybrid-moe", split_overrides(overrides)).model


@pytest.mark.parametrize("name", IMPORTED)
@pytest.mark.parametrize("form", ["of ranks", "universal"])
def test_weights_are_imported(
    name: str, form: str, folder: Path, theirs: dict[str, dict], universal: None
) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    source = folder / "checkpoints" / f"their-{name}"
    if form == "universal":
        source = source.with_name(f"their-{name}-universal")
    model = model_of(MODELS["softmax" if "ulysses" in name else "hybrid"])
    found = import_checkpoint(source, model)
    assert found.weights.keys() == theirs[name]["saved"].keys()
    for weight, value in theirs[name]["saved"].items():
        assert torch.equal(found.weights[weight], value), weight
    assert found.selection_bias is not None
    assert bool(found.selection_bias.any()) == ("ulysses" in name)


def test_a_model_of_transformers_is_imported(shards: Path, folder: Path) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    run_on_ranks(2, SCRIPT, *arguments(shards, folder, {"transformers": DENSE}))
    found, config = torch.load(folder / "transformers.pt"), model_of(DENSE)
    model = Transformer(config)
    source = folder / "checkpoints" / "transformers"
    model.load_state_dict(import_checkpoint(source, config).weights)
    torch.testing.assert_close(model(found["tokens"]).value, found["logits"])


@pytest.mark.parametrize(
    ("path", "overrides", "reason"),
    [
        ("nothing", SMALL, "neither a file `latest`"),
        ("their-zero1", f"{SMALL},model.n_layers=8", "weights are missing: layers.4"),
        (
            "their-zero1",
            f"{SMALL},model.d_ff=48,model.vocab_size=512",
            "embedding.weight has 65536 elem",
        ),
        (
            "their-zero2-ulysses",
            f"{MODELS['softmax']},model.moe.balance=batch",
            "by a selection bias, .* model.moe.balance = batch leaves out",
        ),
        ("their-zero1-bf16", SMALL, "cannot put the weights of its ranks together"),
    ],
)
def test_what_is_no_checkpoint_of_the_model_is_refused(
    path: str, overrides: str, reason: str, folder: Path, theirs: dict[str, dict]
) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    with pytest.raises(UserError, match=reason):
        import_checkpoint(folder / "checkpoints" / path, model_of(overrides))


@pytest.mark.parametrize("missing", [0, 1])
def test_an_engine_names_the_file_of_a_rank_that_is_missing(tmp_path: Path, missing: int) -> None:
    from pretrain.engines.deepspeed.checkpoint import check_same_ranks

    files = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)]
    for rank, file in enumerate(files):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        (tmp_path / file).touch()
    check_same_ranks(tmp_path, 2, stage=3)
    (tmp_path / files[missing]).unlink()
    told = rf"{tmp_path}: files are missing: {files[missing]} \(1 in all\); copy those of all ranks"
    with pytest.raises(UserError, match=told):
        check_same_ranks(tmp_path, 2, stage=3)


@pytest.mark.parametrize(
    ("stage", "file"),
    [(1, "mp_rank_00_model_states.pt"), (3, "zero_pp_rank_0_mp_rank_00_model_states.pt")],
)
@pytest.mark.parametrize("kind", ["universal", "of one rank"])
def test_an_engine_names_the_file_that_is_missing_of_all_ranks(
    tmp_path: Path, stage: int, file: str, kind: str
) -> None:
    from pretrain.engines.deepspeed.checkpoint import check_same_ranks

    if kind == "universal":
        (tmp_path / "zero").mkdir()
    else:
        (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match=f"files are missing: {file} "):
        check_same_ranks(tmp_path, 1, stage)
    (tmp_path / file).touch()
    check_same_ranks(tmp_path, 1, stage)


def test_half_of_a_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    from pretrain.engines.deepspeed.checkpoint import import_checkpoint

    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as told:
            import_checkpoint(folder, model_of(SMALL))
        return str(told.value)

    (tmp_path / "latest").write_text("global_step3")
    assert "latest names global_step3, where neither" in refused(tmp_path)
    step = tmp_path / "global_step3"
    step.mkdir()
    for content in (b"", b"PK", b"text"):
        (step / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(content)
        assert "copy the files of all ranks" in refused(tmp_path)

    universal = tmp_path / "universal"
    for name, weight in Transformer(model_of(SMALL)).state_dict().items():
        (universal / "zero" / name).mkdir(parents=True)
        torch.save({"param": weight}, universal / "zero" / name / "fp32.pt")
    assert "no *model_states.pt" in refused(universal)
    whole = (universal / "zero" / name / "fp32.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (universal / "zero" / name / "fp32.pt").write_bytes(content)
        assert f"{name}/fp32.pt cannot be read" in refused(universal)
    (universal / "zero" / name / "fp32.pt").unlink()
    torch.save({}, universal / "mp_rank_00_model_states.pt")
    assert "weights are missing" in refused(universal)
