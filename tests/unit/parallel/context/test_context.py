"""Attention, scan and convolution of rows that ranks share are those of whole rows, in float64."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("context_cases.py")
TOLERANCE = 1e-12
ALWAYS = {"ring", "scan", "scan from a state", "convolution"}
KERNELS = {1: ALWAYS, 2: ALWAYS | {"ulysses"}, 4: ALWAYS | {"ulysses", "two levels"}}
H, H_KV, D, E, CHANNELS, WIDTH, WINDOW = 4, 2, 8, 6, 5, 4, 5
Found = list[tuple[dict[str, float], dict[int, dict[str, int]]]]


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of each rank: errors by kernel and documents, and bytes sent by length and kernel."""
    results = tmp_path_factory.mktemp("context") / "results.pt"
    run_on_ranks(request.param, SCRIPT, str(results))
    return torch.load(results)


def test_kernels_equal_themselves_on_whole_rows(found: Found) -> None:
    kernels = {case.partition(":")[0].partition(",")[0] for case in found[0][0]}
    assert kernels == KERNELS[len(found)]
    errors = {
        f"{case} on rank {rank}": error
        for rank, (of_rank, _) in enumerate(found)
        for case, error in of_rank.items()
    }
    wrong = {case: f"{error:.1e}" for case, error in errors.items() if not error <= TOLERANCE}
    assert not wrong


def test_bytes_are_those_of_the_docstrings(found: Found) -> None:
    n = len(found)
    for rank, (_, by_length) in enumerate(found):
        for length, sent in by_length.items():
            t = length // n
            keys = 2 * t * H_KV * D * 4
            # Forward n - 1 times, backward as often, and gradients all the way round.
            assert sent["ring"] == (keys * (3 * n - 2) if n > 1 else 0)
            # Two blocks of each rank, though those of the last are one.
            assert sent["scan"] == 2 * (n - 1) * H * (D * (D + E) + D * E) * 4 * (n > 1)
            # As many tokens are sent forward as gradients are backward.
            borders = 2 * borders_with_others(rank, n)
            assert sent["convolution"] == borders * (WIDTH - 1) * CHANNELS * 4
            assert sent["window"] == borders * (WINDOW - 1) * 2 * H_KV * D * 4


def borders_with_others(rank: int, n: int) -> int:
    """Blocks of zigzag whose next block is on another rank."""
    if n == 1:
        return 0
    return 1 if rank in (0, n - 1) else 2


def test_states_and_halos_do_not_grow_with_the_sequence(found: Found) -> None:
    for _, by_length in found:
        short, long = by_length.values()
        assert long["ring"] == 2 * short["ring"]
        assert all(long[kernel] == short[kernel] for kernel in ("scan", "convolution", "window"))
