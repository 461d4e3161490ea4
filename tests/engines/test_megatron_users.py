"""Our layers in the specs of a megatron-core user, as docs/megatron.md has them."""

from pathlib import Path

import pytest
import torch

from tests.engines.test_megatron import run
from tests.oracle.compare import assert_same

pytestmark = pytest.mark.oracle

THEIRS = Path(__file__).with_name("megatron_user_cases.py")
CASES = [
    f"{model}-{rows}"
    for model in ("softmax", "hybrid")
    for rows in ("packed-cp1", "packed-cp2", "whole-cp1", "whole-cp2", "apart-cp1")
]


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    cases = dict.fromkeys([*CASES, "first-weights"], "train.seed=0")
    return run(2, THEIRS, shards, tmp_path_factory.mktemp("users"), cases)


@pytest.mark.parametrize("rows", ["packed", "whole"])
@pytest.mark.parametrize("model", ["softmax", "hybrid"])
def test_ranks_that_share_rows_compute_what_one_computes(
    model: str, rows: str, found: dict[str, dict]
) -> None:
    alone, shared = (found[f"{model}-{rows}-{ranks}"] for ranks in ("cp1", "cp2"))
    assert_same(shared, alone)


@pytest.mark.parametrize("model", ["softmax", "hybrid"])
def test_packed_documents_are_computed_as_each_alone(model: str, found: dict[str, dict]) -> None:
    assert_same(found[f"{model}-packed-cp1"], found[f"{model}-apart-cp1"])


def test_ranks_that_share_heads_begin_with_different_ones(found: dict[str, dict]) -> None:
    one, other = found["first-weights"]["of_ranks"]
    copies = {name for name, weight in one.items() if torch.equal(weight, other[name])}
    assert copies == {"gated_delta.norm.weight"}
    assert torch.equal(*found["first-weights"]["draws_afterwards"])
