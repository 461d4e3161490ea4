"""Who is to blame, from what the ranks of a job say that they are doing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

NAMED_AT_MOST = 8
# How long the ranks of a job take at most to find out; NCCL must not end them meanwhile.
VERDICT_S = 60.0


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

    def to_json(self) -> str:
        """As short for thousands of ranks as for two, where they lie along an axis of a mesh."""
        return json.dumps(asdict(self) | {"ranks": _as_range(self.ranks) or list(self.ranks)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        fields = json.loads(text)
        ranks = fields["ranks"]
        fields["ranks"] = range(*ranks["range"]) if isinstance(ranks, dict) else tuple(ranks)
        return cls(**fields)


def _as_range(ranks: Sequence[int]) -> dict[str, list[int]] | None:
    """Start, stop and step of evenly spaced ranks."""
    if len(ranks) < 2:
        return None
    spaced = [ranks[0], ranks[-1] + 1, ranks[1] - ranks[0]]
    return {"range": spaced} if spaced[2] > 0 and [*range(*spaced)] == [*ranks] else None


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
    """The ranks that `first` waits for, then those that they wait for, and so on; `first` itself
    where it comes to that.

    Each group is gone through twice at most: all its ranks are in one of two collectives, or else
    in another one than that.
    """
    # A dictionary keeps the order and knows its members.
    chain: dict[int, None] = {}
    collectives: dict[Sequence[int], set[str]] = {}
    waiting = [first]
    for rank in waiting:
        answer = answers[rank]
        seen = collectives.setdefault(answer.ranks, set())
        if answer.what in seen or len(seen) == 2:
            continue
        seen.add(answer.what)
        awaited = (other for other in answer.ranks if other not in chain)
        late = [other for other in awaited if answers[other].what != answer.what]
        chain |= dict.fromkeys(late)
        waiting += late
    return list(chain)
