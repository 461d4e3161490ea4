"""What a mixture is made of: sources, how much of each, and from which token on."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from data_pipeline.errors import DataError

MOST_TIMES = 1000
"""How often an epoch visits a document at most."""
DECIMALS_OF_TIMES = 3


def without_credentials(address: str) -> str:
    """A path as it is; a URL without user, password, query and fragment, which may be secret."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


@dataclass(frozen=True)
class Source:
    """A folder of shards, and how much of it is used.

    Attributes:
        weight: its share of the tokens, relative to those of the others [1].
        epochs: instead of weights, how often to pass over the source, as in 3.4 or 0.44; then every
            source has it, shares follow from the sizes, and the stream has an end.
        max_epochs: with weights, passes after which the source is left out.
        upsample: visits of an epoch to a document by its least number of tokens, as in
            {8192: 2, 32768: 4.5}; shorter ones are visited once.
        growing: its shards are still being written; they are read in that order.
        name: what a curriculum calls it [the last part of its path, without credentials].
    """

    path: str
    weight: float | None = None
    epochs: float | None = None
    max_epochs: float | None = None
    upsample: Mapping[int, float] = field(default_factory=dict)
    growing: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            address = without_credentials(self.path)
            object.__setattr__(self, "name", Path(address).name or address)
        self._check()

    @property
    def limit(self) -> Fraction | None:
        """Epochs after which it is used up."""
        limit = self.max_epochs if self.epochs is None else self.epochs
        return None if limit is None else Fraction(str(limit))

    @property
    def times(self) -> dict[int, Fraction]:
        return {least: Fraction(str(times)) for least, times in self.upsample.items()}

    def _check(self) -> None:
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            self._refuse(
                f"weight={self.weight} is not allowed: weights are finite and above 0. To leave a "
                "source out, remove it from the list"
            )
        for name, limit in (("epochs", self.epochs), ("max_epochs", self.max_epochs)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                self._refuse(f"{name}={limit} is not allowed: it is finite and above 0")
        if self.epochs is not None and not (self.weight is self.max_epochs is None):
            self._refuse(
                f"epochs={self.epochs} says how much of the source is used; leave out weight and "
                "max_epochs, or give these two and no epochs"
            )
        if self.growing and self.limit is not None:
            self._refuse(
                "a growing source has no end yet, so that epochs and max_epochs mean nothing: "
                "leave them out, or wait until its shards are written and leave out growing"
            )
        for least, times in self.upsample.items():
            if least < 1 or not (
                0 < times <= MOST_TIMES and round(times, DECIMALS_OF_TIMES) == times
            ):
                self._refuse(
                    f"upsample={{{least}: {times}}} is not allowed: {{tokens: times}} with tokens "
                    f"above 0, and times above 0 and up to {MOST_TIMES}, with at most "
                    f"{DECIMALS_OF_TIMES} decimals"
                )

    def _refuse(self, why: str) -> None:
        raise DataError(f"source {without_credentials(self.path)}: {why}")


@dataclass(frozen=True)
class WeightsFrom:
    """Weights from a token of the stream on.

    Attributes:
        tokens: how many the stream has delivered when they begin to hold.
        weights: by the names of sources; the others keep theirs.
    """

    tokens: int
    weights: Mapping[str, float]


def phases_of(
    sources: Sequence[Source], curriculum: Sequence[WeightsFrom]
) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(first token, weight of each source), in order; the first one begins at 0.

    Raises:
        DataError: epochs and weights are mixed, or a phase makes no sense.
    """
    by_epochs = [source for source in sources if source.epochs is not None]
    if by_epochs and (curriculum or len(by_epochs) < len(sources)):
        other = "a curriculum" if curriculum else "weights for others"
        raise DataError(
            f"data.shards: epochs={by_epochs[0].epochs} for "
            f"{without_credentials(by_epochs[0].path)} and {other}: give epochs for "
            "every source and no curriculum, or weights for all (with max_epochs to end one)"
        )
    names = [source.name for source in sources]
    if curriculum and len(set(names)) < len(names):
        raise DataError(
            f"data.curriculum: two sources have one name ({', '.join(names)}); give each a `name`"
        )
    weights = {
        number: 1.0 if source.weight is None else source.weight
        for number, source in enumerate(sources)
    }
    phases = [(0, tuple(weights.values()))]
    for phase in curriculum:
        if phase.tokens <= phases[-1][0]:
            raise DataError(
                f"data.curriculum: a phase begins at token {phase.tokens}, and the one before at "
                f"{phases[-1][0]}: give them in order, the first one above 0"
            )
        for name, weight in phase.weights.items():
            if name not in names:
                raise DataError(
                    f"data.curriculum: the phase from token {phase.tokens} names {name!r}, which "
                    f"is none of the sources: {', '.join(names)}"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise DataError(
                    f"data.curriculum: the phase from token {phase.tokens} has the weight {weight} "
                    f"for {name}: weights are finite and at least 0"
                )
            weights[names.index(name)] = float(weight)
        phases.append((phase.tokens, tuple(weights.values())))
    _refuse_without_weight(sources, phases)
    return tuple(phases)


def _refuse_without_weight(
    sources: Sequence[Source], phases: Sequence[tuple[int, tuple[float, ...]]]
) -> None:
    for number, source in enumerate(sources):
        if not any(weights[number] > 0 for _, weights in phases):
            raise DataError(
                f"source {without_credentials(source.path)}: weight={source.weight} is not above 0 "
                "in any phase. To leave a source out, remove it from the list"
            )
    for tokens, weights in phases:
        if not any(weights):
            raise DataError(
                f"data: from token {tokens} on, all weights are 0; give one of "
                f"{', '.join(source.name for source in sources)} a weight above 0"
            )


def shares_of(weights: Sequence[float | int], scale: int) -> list[int]:
    """Whole numbers that sum to `scale`, in proportion to the weights; at least 1 if not 0."""
    total = sum(Fraction(weight) for weight in weights)
    exact = [Fraction(weight) * scale / total for weight in weights]
    shares = [max(int(share), share > 0) for share in exact]
    # The rest goes to those that rounding has cost most.
    by_loss = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    missing = scale - sum(shares)
    for i in by_loss[: max(missing, 0)]:
        shares[i] += 1
    if missing < 0:
        shares[shares.index(max(shares))] += missing
    return shares
