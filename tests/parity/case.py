"""What ranks are asked to do."""

from dataclasses import dataclass


@dataclass
class Case:
    """A layout of a model, trained for some steps.

    Attributes:
        ranks: how many.
        overrides: of the recipe `tiny-hybrid-moe`.
        steps: of the optimizer.
        results: the folder where rank N leaves what `train_case` returned, as rank-N.pt.
        routing: `record` the experts that are chosen, or the results of one rank that did, to
            choose the same.
        breaks: what is deliberately wrong, a name in `broken.BREAKS`.
    """

    ranks: int
    overrides: list[str]
    steps: int
    results: str
    routing: str | None = None
    breaks: str | None = None
