"""Runs cases and compares a layout with one rank."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.parity.train_case import Case
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("train_case.py")


class Result(NamedTuple):
    """What each rank returned, and where that lies."""

    ranks: list[dict[str, Any]]
    folder: Path


class Difference(NamedTuple):
    """How far a layout is from one rank, and where it is farthest."""

    error: float
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {self.error:.1e}"


class Ranks:
    """Ranks to run cases on. Each case is run once, however often it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count()
        self._results: dict[str, Result] = {}

    def run(self, ranks: int, overrides: Sequence[str], steps: int, **options: Any) -> Result:
        """Run a case; fails with the output of a rank that fails."""
        (result,) = self.run_together(ranks, [overrides], steps, **options)
        return result

    def run_together(
        self, ranks: int, cases: Sequence[Sequence[str]], steps: int, **options: Any
    ) -> list[Result]:
        """Run cases in one launch, whose ranks start and connect once."""
        keys = [json.dumps([ranks, list(overrides), steps, options]) for overrides in cases]
        new = {
            key: Case(list(overrides), steps, str(self._make_folder()), **options)
            for key, overrides in zip(keys, cases, strict=True)
            if key not in self._results
        }
        if new:
            run_on_ranks(ranks, SCRIPT, json.dumps([asdict(case) for case in new.values()]))
        for key, case in new.items():
            folder = Path(case.results)
            outcomes = [torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)]
            self._results[key] = Result(outcomes, folder)
        return [self._results[key] for key in keys]

    def _make_folder(self) -> Path:
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        return folder


def difference(ours: Result, one_rank: Result) -> Difference:
    """The largest of the relative differences in losses, gradients and weights.

    Every rank is looked at, so that copies of a weight that drift apart are found.
    """
    (reference,) = one_rank.ranks
    return max(
        *_differences_in_series(ours, reference["series"]),
        *_differences_in_tensors("gradients", ours, reference),
        *_differences_in_tensors("weights", ours, reference),
    )


def _differences_in_series(ours: Result, reference: dict[str, list[float]]) -> list[Difference]:
    return [
        Difference(_relative(torch.tensor(a), torch.tensor(b)), f"{name} of step {step}")
        for rank in ours.ranks
        for name, expected in reference.items()
        for step, (a, b) in enumerate(zip(rank["series"][name], expected, strict=True), start=1)
    ]


def _differences_in_tensors(kind: str, ours: Result, reference: dict[str, Any]) -> list[Difference]:
    expected = reference[kind]
    names = {name for rank in ours.ranks for name in rank[kind]}
    assert names == expected.keys(), f"{kind} without a counterpart: {names ^ expected.keys()}"
    return [
        Difference(_relative(tensor, expected[name]), f"{kind}, {name} on rank {number}")
        for number, rank in enumerate(ours.ranks)
        for name, tensor in rank[kind].items()
    ]


def _relative(a: Tensor, b: Tensor) -> float:
    error, norm = float((a - b).double().norm()), float(b.double().norm())
    if error != error:
        return float("inf")
    return error / norm if norm else error
