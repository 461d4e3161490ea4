"""Who is to blame, from what the ranks of a job say that they are doing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NAMED_AT_MOST = 8


@dataclass(frozen=True)
class Answer:
    """What a rank is doing.

    Attributes:
        what: a collective and the axis it goes along, or a function and a line.
        ranks: those that take part in the collective; () outside of one.
        step: what the rank is working on.
        phase: of the step.
        silent_s: how long the rank has been in it.
    """

    what: str
    ranks: Sequence[int]
    step: int
    phase: str
    silent_s: float

    def when(self) -> str:
        return f"at step {self.step} ({self.phase}, for {self.silent_s:.0f} s)"


def first_of(lines: Sequence[str]) -> str:
    """The first of `lines`, and how many more there are."""
    more = len(lines) - NAMED_AT_MOST
    return "; ".join([*lines[:NAMED_AT_MOST], *([f"and {more} more"] if more > 0 else [])])


def who_has_not_arrived(asking: int, answers: Mapping[int, Answer]) -> list[tuple[int, str]]:
    """Of ranks that are all alive: who keeps the others waiting, and where.

    Args:
        asking: the rank that has noticed.
        answers: of all ranks.
    """
    outside = [rank for rank, answer in answers.items() if not answer.ranks]
    is_awaited = len(outside) < len(answers)
    how = "has not arrived: it is" if is_awaited else "waits for no other rank: it is"
    return [
        (rank, f"{how} in {answers[rank].what} {answers[rank].when()}")
        for rank in sorted(outside) or _chain(asking, answers)
    ]


def _chain(first: int, answers: Mapping[int, Answer]) -> list[int]:
    """The ranks that `first` waits for, then those that they wait for, and so on."""
    chain = [first]
    for waiting in chain:
        chain += [
            rank
            for rank in answers[waiting].ranks
            if rank not in chain and answers[rank].what != answers[waiting].what
        ]
    return chain[1:]
