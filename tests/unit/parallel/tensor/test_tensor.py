"""Layers shared out over ranks equal whole ones, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("tensor_cases.py")
TOLERANCE = 1e-10
MODELS = [
    "softmax",
    "softmax-2-kv-heads",
    "softmax-1-kv-head-no-gate",
    "linear",
    "linear-2-key-heads",
    "linear-1-key-head",
    "experts",
    "hybrid-tied",
]


@pytest.fixture(scope="module", params=[2, 4])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of each case, the largest relative error of loss, last hidden state and all gradients."""
    folder = tmp_path_factory.mktemp("tensor")
    run_on_ranks(request.param, SCRIPT, str(folder))
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("documents", ["whole", "packed"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_ranks_equals_the_whole_one(
    results: dict[str, Any], model: str, documents: str
) -> None:
    error, worst = results["errors"][f"{model}-{documents}"]
    assert error <= TOLERANCE, worst


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activations_can_be_recomputed(results: dict[str, Any], mode: str) -> None:
    error, worst = results["errors"][mode]
    assert error <= TOLERANCE, worst


def test_the_gradient_of_x_travels_while_those_of_the_projections_are_computed(
    results: dict[str, Any],
) -> None:
    start, *meanwhile, wait = results["events"]
    assert (start, wait) == ("start", "wait")
    assert {"gate.weight", "up.weight"} <= set(meanwhile)


def test_fsdp_and_checkpoints_shard_the_shares_again(results: dict[str, Any]) -> None:
    error, worst = results["errors"]["fsdp"]
    assert error <= TOLERANCE, worst


@pytest.mark.parametrize("broken", ["WithoutSum", "WrongOrder"])
def test_a_broken_collective_is_seen(results: dict[str, Any], broken: str) -> None:
    error, _ = results["errors"][broken]
    assert error > 1e-2
