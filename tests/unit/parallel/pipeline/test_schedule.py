"""The schedules of a pipeline: gradients of one rank, each stage once per microbatch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("schedule_cases.py")
STEPS_X_MICROBATCHES = 2 * 6

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Case -> what each rank found."""
    path = tmp_path_factory.mktemp("schedule") / "found.pt"
    run_on_ranks(2, SCRIPT, str(path))
    return torch.load(path)


def test_gradients_are_those_of_one_rank(found: Found) -> None:
    """Also of losses attached to a stage's output, and through hand-written functions."""
    for name, ranks in found.items():
        tolerance = 3e-2 if "bf16" in name else 1e-6
        assert all(rank["error"] < tolerance for rank in ranks), (name, ranks)


def test_stages_run_once_per_microbatch(found: Found) -> None:
    """Not once more in the first step, to find out shapes: stages measure what passes."""
    calls = {calls for ranks in found.values() for rank in ranks for calls in rank["stage_calls"]}
    assert calls == {STEPS_X_MICROBATCHES}


def test_activations_are_recomputed_once(found: Found) -> None:
    for name, ranks in found.items():
        factor = 2 if "recompute" in name else 1
        calls = {calls for rank in ranks for calls in rank["block_calls"]}
        assert calls == {factor * STEPS_X_MICROBATCHES}, name


def test_the_order_is_what_runs(found: Found) -> None:
    wrong = [name for name, ranks in found.items() if not all(r["order_is_as_told"] for r in ranks)]
    assert not wrong


def test_bubbles_are_those_of_theory(found: Found) -> None:
    """Of p = 2 ranks and m = 6 microbatches: (p - 1) / (v m + p - 1), or less in halves."""
    for name, ranks in found.items():
        (bubble,) = {rank["predicted_bubble"] for rank in ranks}
        if name.startswith(("gpipe", "1f1b")):
            assert bubble == pytest.approx(1 / 7), name
        elif name == "interleaved":
            assert bubble == pytest.approx(1 / 19)
        else:
            assert 0 <= bubble < (1 / 7 if "recompute" in name else 1 / 13), name


def test_ranks_tell_for_how_long_they_compute(found: Found) -> None:
    assert all(0 < rank["busy_share"] < 1 for ranks in found.values() for rank in ranks)
