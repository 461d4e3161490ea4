"""Judges each step before its weights are touched, and says how a run gets past what it refuses."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pretrain.config import GuardConfig
from pretrain.errors import TrainingError

# MAD to standard deviation, where values are normally distributed.
SIGMAS_PER_MAD = 1.4826
# So that a ripple of a curve that hardly moves is no spike: the least that counts as one sigma,
# relative to the loss, and of the logarithm of the gradient norm.
LEAST_SIGMA_OF_LOSS = 0.02
LEAST_SIGMA_OF_LOG_NORM = 0.1


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        kind: what to do: `skip` the batch, or `roll back` as well.
        reason: with the numbers.
    """

    kind: Literal["skip", "roll back"]
    reason: str


@dataclass(frozen=True)
class Place:
    """Where a batch lies in the stream: [first, stop), in tokens."""

    first: int
    stop: int


@dataclass(frozen=True)
class Rollback:
    """How a run gets past a spike.

    Attributes:
        step: as which the batch was tried.
        to_step: the run goes back to this step, or before.
        skip: what is skipped from now on.
        nearby: the rollbacks for spikes at this place so far, this one among them.
        settled_at: a spike at this token of the stream or later is one at another place.
    """

    step: int
    reason: str
    to_step: int
    skip: Place
    nearby: int
    settled_at: int


@dataclass(frozen=True)
class Past:
    """What the guard has done in the attempts of a run so far.

    Attributes:
        skipped: [first, stop) of the stream's tokens.
        nearby, settled_at: of the last `Rollback`.
        go_back_to: a rollback to this step, or before, that has begun and not ended.
    """

    skipped: Sequence[tuple[int, int]] = ()
    nearby: int = 0
    settled_at: int = 0
    go_back_to: int | None = None


class Guard:
    """Compares each step with those before it. Equal on all ranks, as what it is told is.

    The robust z-score of a value is its distance from the median of the last steps, in standard
    deviations estimated from the median absolute deviation (Iglewicz & Hoaglin 1993, How to Detect
    and Handle Outliers): a spike does not hide the next one. Of the gradient norm it is taken of
    the logarithm.

    What was skipped for a spike is skipped by whoever comes to that place again. A second spike
    before a window of good steps has passed widens the skip to twice as many batches on either
    side, and goes back to a checkpoint from before them.
    """

    def __init__(self, config: GuardConfig, past: Past, *, can_replay: bool = True) -> None:
        """
        Args:
            can_replay: whether `farspan replay` knows the engine, so that it is worth naming.
        """
        self._config, self._can_replay = config, can_replay
        self._recent: deque[tuple[float, float]] = deque(maxlen=config.window)
        self._skipped = [Place(*place) for place in past.skipped]
        self._skips_in_a_row = 0
        self._rollbacks = past.nearby
        self._settled_at = past.settled_at

    def judge(self, loss: float, grad_norm: float) -> Verdict | None:
        """None if the step may be taken; it is remembered then."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return Verdict("skip", f"the {name} is {value}")
        sigmas = self._config.spike_sigmas
        if sigmas is not None and len(self._recent) >= self._config.history:
            for name, value, score in self._scores(loss, grad_norm):
                if score > sigmas:
                    return Verdict(
                        "roll back",
                        f"the {name} is {value:.6g}, {score:.1f} sigmas above the median of the "
                        f"last {len(self._recent)} steps",
                    )
        self._recent.append((loss, grad_norm))
        self._skips_in_a_row = 0
        return None

    def passes_over(self, place: Place) -> bool:
        """Whether any of a batch has been skipped before."""
        return any(place.first < s.stop and s.first < place.stop for s in self._skipped)

    def skip(self, step: int, place: Place, reason: str) -> None:
        """Skip a batch that has no finite loss or gradient.

        Raises:
            TrainingError: the ones just before had none either.
        """
        self._skips_in_a_row += 1
        self._skipped.append(place)
        if self._skips_in_a_row > self._config.max_skips:
            raise TrainingError(
                f"{reason} at step {step}, and so it was for the {self._config.max_skips} batches "
                "before (guard.max_skips): the weights are no longer any good, or the precision is "
                f"too low. {self._replay(step, 'names the first layer whose output is not finite')}"
                "The checkpoints are from before"
            )

    def roll_back(self, step: int, place: Place, reason: str) -> Rollback:
        """Skip a batch whose loss or gradient norm was a spike, and those near it if they were
        skipped for one before.

        Raises:
            TrainingError: too many rollbacks without a window of good steps between them.
        """
        is_same_place = place.first < self._settled_at
        self._rollbacks = self._rollbacks + 1 if is_same_place else 1
        if self._rollbacks > self._config.max_rollbacks:
            raise TrainingError(
                f"{reason} at step {step}, after {self._config.max_rollbacks} rollbacks nearby "
                "(guard.max_rollbacks): it is not the data. A lower optim.lr or optim.clip may "
                f"help (--allow-change). {self._replay(step, 'shows the step again')}"
                "The checkpoints are from before"
            )
        width = 2 ** (self._rollbacks - 1)
        size = place.stop - place.first
        beside = (width - 1) * size
        skip = Place(place.first - beside, place.stop + beside)
        self._skipped.append(skip)
        self._settled_at = place.stop + self._config.window * size
        to_step = max(0, step - width)
        return Rollback(step, reason, to_step, skip, self._rollbacks, self._settled_at)

    def state(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the last steps."""
        return list(self._recent)

    def load_state(self, state: Iterable[tuple[float, float]]) -> None:
        self._recent.clear()
        self._recent.extend((loss, norm) for loss, norm in state)

    def _replay(self, step: int, shows: str) -> str:
        return f"`farspan replay RUN --step {step}` {shows}. " if self._can_replay else ""

    def _scores(self, loss: float, grad_norm: float) -> Iterable[tuple[str, float, float]]:
        losses, norms = zip(*self._recent, strict=True)
        yield "loss", loss, _score(loss, losses, LEAST_SIGMA_OF_LOSS * abs(median(losses)))
        log_norms = [_log(norm) for norm in norms]
        yield (
            "gradient norm",
            grad_norm,
            _score(_log(grad_norm), log_norms, LEAST_SIGMA_OF_LOG_NORM),
        )


def _score(value: float, others: Iterable[float], least_sigma: float) -> float:
    others = list(others)
    middle = median(others)
    sigma = SIGMAS_PER_MAD * median(abs(other - middle) for other in others)
    return (value - middle) / max(sigma, least_sigma, 1e-12)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
