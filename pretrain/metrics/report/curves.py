"""Evaluations as curves: accuracy over examples, loss over positions. Drawn as SVG, not by Bokeh,
as they replace themselves with the rest of a fragment.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from pretrain.metrics.evaluation import Evaluation
from pretrain.metrics.report.layout import COLORS
from pretrain.metrics.report.run import Run

WIDTH, HEIGHT = 460, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 450, 8, 168
Y_TICKS = 5


class Curve(NamedTuple):
    """Values at the chart's places from left to right, None where there is none."""

    label: str
    color: str
    values: Sequence[float | None]


class CurveChart(NamedTuple):
    """
    Attributes:
        places: labels along the horizontal axis, which are evenly spaced.
        low, high: of the vertical axis.
        is_share: values are shares, 0 to 1.
    """

    title: str
    unit: str
    help: str
    places: Sequence[str]
    curves: Sequence[Curve]
    low: float
    high: float
    is_share: bool

    def points(self, curve: Curve) -> list[tuple[float, float, str]]:
        """x, y and what a pointer is told, of each value."""
        return [
            (self.x(at), self.y(value), f"{curve.label}, {place}: {self.shown(value)}")
            for at, (place, value) in enumerate(zip(self.places, curve.values, strict=True))
            if value is not None
        ]

    def x(self, at: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * (at + 0.5) / len(self.places), 1)

    def y(self, value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low), 1)

    def shown(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.is_share else f"{value:.3g}"

    @property
    def y_ticks(self) -> list[float]:
        step = (self.high - self.low) / (Y_TICKS - 1)
        return [self.low + step * tick for tick in range(Y_TICKS)]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        every = -(-len(self.places) // 9)
        return [(self.x(at), place) for at, place in enumerate(self.places) if at % every == 0]


def by_shots(run: Run) -> CurveChart | None:
    """Accuracy over how many examples come before, of the newest `farspan eval --suite icl`."""
    files = sorted(run.directory.evaluations.glob("icl-*.json"))
    if not files:
        return None
    tree = json.loads(files[-1].read_text())
    shots, tasks = tree["request"]["shots"], tree["request"]["tasks"]
    found = {(cell["task"], cell["shots"]): cell["accuracy"] for cell in tree["cells"]}
    curves = [
        Curve(task, COLORS[at % len(COLORS)], [found.get((task, n)) for n in shots])
        for at, task in enumerate(tasks)
    ]
    what = "Accuracy by how many examples of the rule come before."
    places = [f"{n} shot" if n == 1 else f"{n} shots" for n in shots]
    return CurveChart("Accuracy over examples", "", what, places, curves, 0.0, 1.0, True)


def by_position(found: Sequence[tuple[str, Evaluation]]) -> CurveChart | None:
    """Loss over how many tokens come before, of each run that was evaluated.

    A model that has diverged has losses that are not finite, and no curve.
    """
    tables = [(name, _finite_losses(evaluation)) for name, evaluation in found]
    tables = [(name, losses) for name, losses in tables if losses]
    if not tables:
        return None
    firsts = sorted({first for _, losses in tables for first in losses})
    curves = [
        Curve(name, COLORS[at % len(COLORS)], [losses.get(first) for first in firsts])
        for at, (name, losses) in enumerate(tables)
    ]
    values = [loss for _, losses in tables for loss in losses.values()]
    room = 0.05 * (max(values) - min(values)) or 0.05
    low, high = min(values) - room, max(values) + room
    places = [f"{first:,}" for first in firsts]
    help_text = found[0][1].loss_help
    return CurveChart("Loss by position", "nats/token", help_text, places, curves, low, high, False)


def _finite_losses(evaluation: Evaluation) -> dict[int, float]:
    return {
        bucket["first"]: bucket["loss"]
        for bucket in evaluation.loss_by_position
        if math.isfinite(bucket["loss"])
    }
