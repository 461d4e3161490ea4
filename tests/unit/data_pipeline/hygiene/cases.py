"""The marked texts of privacy_cases.txt, and how much of what is marked is found."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.hygiene.privacy import find_personal

CASES = Path(__file__).parent / "privacy_cases.txt"
KINDS = ("email", "ip_address", "phone", "card")
Found = set[tuple[int, int, str]]


class Case(NamedTuple):
    text: str
    wanted: Found


class Score(NamedTuple):
    """Of one kind: the marked places found whole, the others found, and the marked ones missed."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / (self.right + self.missed)


def read_cases() -> Iterator[Case]:
    kind = ""
    for line in CASES.read_text().splitlines():
        if section := re.fullmatch(r"\[(\w+)\]", line):
            kind = section[1]
        elif line and not line.startswith("#"):
            pieces = re.split("[⟦⟧]", line)
            ends = [sum(map(len, pieces[:place])) for place in range(len(pieces))]
            marked = zip(ends[1::2], ends[2::2], strict=True)
            yield Case("".join(pieces), {(*span, kind) for span in marked})


def masked_places(text: str) -> Found:
    """What is found, without what lies in something found before it."""
    places, end = set(), 0
    for start, stop, kind in sorted(find_personal(text), key=lambda place: (place[0], -place[1])):
        if start >= end:
            places.add((start, stop, kind))
            end = stop
    return places


def score(kind: str) -> Score:
    """Counts of a kind over the cases of all kinds."""
    right = wrong = missed = 0
    for case in read_cases():
        found = {place for place in masked_places(case.text) if place[2] == kind}
        wanted = {place for place in case.wanted if place[2] == kind}
        right += len(found & wanted)
        wrong += len(found - wanted)
        missed += len(wanted - found)
    return Score(right, wrong, missed)
