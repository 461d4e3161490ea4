"""Our exchange of heads for tokens against DeepSpeed's, in float64."""

from pathlib import Path

import pytest
import torch

from tests.oracle.compare import assert_same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).with_name("ulysses_cases.py")
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    file = tmp_path_factory.mktemp("ulysses") / "results.pt"
    run_on_ranks(2, SCRIPT, str(file))
    return torch.load(file)


# DeepSpeed refuses fewer key heads than ranks.
@pytest.mark.parametrize("key_heads", [8, 4, 2])
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_output_and_gradients_are_those_of_deepspeed(
    results: dict[str, dict], rows: str, key_heads: int
) -> None:
    case = results[f"{rows}-{key_heads}-key-heads"]
    assert_same(case["ours"], case["theirs"], TOLERANCE)
