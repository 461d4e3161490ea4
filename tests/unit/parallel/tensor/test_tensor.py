"""Layers shared out over ranks equal whole ones, in float64."""

from pathlib import Path

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

# Per case, the largest relative error of the loss, the last hidden state and all gradients.
Results = dict[str, tuple[float, str]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("tensor")
    run_on_ranks(request.param, SCRIPT, str(folder))
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("documents", ["whole", "packed"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_ranks_equals_the_whole_one(
    results: Results, model: str, documents: str
) -> None:
    error, worst = results[f"{model}-{documents}"]
    assert error <= TOLERANCE, worst


def test_fsdp_and_checkpoints_shard_the_shares_again(results: Results) -> None:
    error, worst = results["fsdp"]
    assert error <= TOLERANCE, worst


@pytest.mark.parametrize("broken", ["WithoutSum", "WrongOrder"])
def test_a_broken_collective_is_seen(results: Results, broken: str) -> None:
    error, _ = results[broken]
    assert error > 1e-2
