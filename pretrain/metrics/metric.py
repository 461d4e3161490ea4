"""What is said of a metric."""

from dataclasses import dataclass
from typing import Literal, get_args

Reduction = Literal["equal", "sum", "mean", "max", "rank 0"]

# What each of them means, for those who read a number.
REDUCTIONS: dict[Reduction, str] = {
    "equal": "every rank has the same value, nothing is reduced",
    "sum": "computed from what all ranks add up to, each token, slot and weight once",
    "mean": "the mean over ranks",
    "max": "the largest over ranks",
    "rank 0": "that of rank 0 alone; where ranks wait for each other, they differ little",
}
assert set(REDUCTIONS) == set(get_args(Reduction))


@dataclass(frozen=True)
class Metric:
    """A number logged at a step.

    Attributes:
        name: `group/name`, the key in metrics.jsonl, W&B and the report.
        unit: what one of it is; "1" for a plain ratio.
        formula: how it is computed from what the step saw.
        help: what it tells the person who watches the run.
        reduction: how the values of ranks become one.
        source: the file that measures it.
    """

    name: str
    unit: str
    formula: str
    help: str
    reduction: Reduction
    source: str
