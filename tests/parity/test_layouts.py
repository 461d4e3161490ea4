"""Every layout gives the losses and the gradient of one rank."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("layout_cases.py")
TIED = "model.tie_embeddings=true,model.vocab_size=1027"
ONE_RANK = {
    "one": "parallel.dp_shard=1",
    "one-by-one": "train.microbatch=1",
    "tied": TIED,
}
LAYOUTS = {
    2: {
        "dp2": "parallel.dp_shard=2",
        "hsdp2": "parallel.dp_replicate=2",
        "dp2-ep2": "parallel.ep=2",
        "bf16": "parallel.ep=2,train.dtype=bfloat16",
    },
    4: {
        "dp4": "parallel.dp_shard=4",
        "dp4-ep2": "parallel.ep=2",
        "dp4-ep4": "parallel.ep=4",
        "hsdp2x2-ep2": "parallel.dp_replicate=2,parallel.ep=2",
        "tied-dp4-ep2": f"parallel.ep=2,{TIED}",
    },
}
TOLERANCE = 1e-5
CLIP = 0.5


@pytest.fixture(scope="module")
def results(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("layouts")
    for nproc, cases in {1: ONE_RANK, **LAYOUTS}.items():
        arguments = [f"{name}:optim.clip={CLIP},{overrides}" for name, overrides in cases.items()]
        run_on_ranks(nproc, SCRIPT, str(shards), str(folder), *arguments)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


EQUAL = ["one-by-one", *(name for cases in LAYOUTS.values() for name in cases if name != "bf16")]


@pytest.mark.parametrize("name", EQUAL)
def test_a_layout_equals_one_rank(name: str, results: dict[str, dict]) -> None:
    ours, reference = results[name], results["tied" if "tied" in name else "one"]
    for series in ("losses", "aux_losses", "grad_norms"):
        assert ours[series] == pytest.approx(reference[series], rel=TOLERANCE), series
    expected = reference["gradients"]
    assert ours["gradients"].keys() == expected.keys()
    errors = {name: relative_error(ours["gradients"][name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"gradient of {worst}: {errors[worst]:.1e}"


def test_bf16_computes_on_float32_weights_and_stays_close(results: dict[str, dict]) -> None:
    ours, reference = results["bf16"], results["one"]
    assert ours["dtypes"] == {torch.float32}
    assert ours["losses"] != reference["losses"]
    assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-3)


def test_every_weight_has_a_gradient_and_the_loss_falls(results: dict[str, dict]) -> None:
    one = results["one"]
    assert all(gradient.norm() > 0 for gradient in one["gradients"].values())
    assert one["losses"][-1] < one["losses"][0]
    assert max(one["grad_norms"]) > CLIP, "clipping has not been at work"


def test_the_balance_loss_uses_the_frequencies_of_the_step_before(
    results: dict[str, dict],
) -> None:
    first, second, *_ = results["one"]["aux_losses"]
    assert first == pytest.approx(1, abs=1e-6), "uniform before the first step"
    assert abs(second - 1) > 1e-4


def test_experts_are_reached_by_all_to_all_only_where_they_are_spread(
    results: dict[str, dict],
) -> None:
    assert results["dp4-ep2"]["expert_calls"] > 0
    assert results["dp4"]["expert_calls"] == 0
