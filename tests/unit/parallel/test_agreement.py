"""What differs between ranks is found, and named on each of them."""

import json
from pathlib import Path

import pytest
import torch

from parallel.agreement import checksum, evidence_of, is_same
from tests.ranks import run_on_ranks

CASES = Path(__file__).with_name("agreement_cases.py")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("agreement")
    run_on_ranks(3, CASES, str(folder))
    on_first, *on_others = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(3))
    assert on_others == [on_first, on_first]
    return on_first


def test_equal_settings_and_weights_pass(errors: dict[str, str]) -> None:
    assert errors["equal settings"] == ""
    assert errors["equal weights"] == ""


def test_other_settings_are_named_by_rank_and_key(errors: dict[str, str]) -> None:
    assert errors["other settings"].splitlines() == [
        "the configuration differs between ranks; compared with rank 0:",
        "  rank 1: model.layer_pattern = ['softmax'], not ['linear', 'softmax']",
        "  rank 1: train.seed = 1, not 0",
    ]


@pytest.mark.parametrize(
    ("case", "weight"),
    [
        ("bit", "second: rank 2 compared with rank 0, 1"),
        ("swap", "second: rank 2 compared with rank 0, 1"),
        ("outside the group", "a: rank 1 compared with rank 0"),
        ("a weight too few", "b: rank 0 compared with rank 1, 2"),
        ("replicas", "sharded: rank 1 compared with rank 0, 2"),
    ],
)
def test_other_weights_are_named_by_rank(errors: dict[str, str], case: str, weight: str) -> None:
    assert errors[case].splitlines() == [
        "weights that must be equal differ between ranks:",
        f"  {weight}",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_the_checksum_sees_each_bit_of_any_type(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).to(dtype).view(4, 6)
    sums = {int(checksum(tensor))}
    as_bytes = tensor.view(torch.uint8)
    for byte in range(tensor.nbytes):
        for bit in range(8):
            as_bytes.view(-1)[byte] ^= 1 << bit
            sums.add(int(checksum(tensor)))
            as_bytes.view(-1)[byte] ^= 1 << bit
    assert len(sums) == 1 + 8 * tensor.nbytes
    assert int(checksum(tensor.t())) not in sums


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 0, 0], True),
        ([2**32 - 1] * 2**10, True),
        ([7], True),
        # Equal sums, and a mean that is one of the numbers.
        ([1, 3, 2], False),
        ([0x10000, 0x30000, 0x20000], False),
        ([0x00010002, 0x00020001], False),
        ([*[2**32 - 1] * 2**10, 2**32 - 2], False),
        ([*[2**32 - 1] * 2**10, 2**32 - 1 - 2**16], False),
    ],
)
def test_sums_tell_whether_all_ranks_have_one_number(numbers: list[int], expected: bool) -> None:
    evidence = torch.tensor([evidence_of(number) for number in numbers], dtype=torch.float64)
    assert is_same(evidence.sum(0).tolist(), len(numbers)) is expected


def test_the_sums_of_a_million_ranks_are_exact() -> None:
    ranks, evidence = 2**20, evidence_of(2**32 - 1)
    sums = [ranks * value for value in evidence]
    assert max(sums) < 2**53
    assert is_same(sums, ranks)
    other = evidence_of(2**32 - 2)
    assert not is_same(
        [total - a + b for total, a, b in zip(sums, evidence, other, strict=True)], ranks
    )
