"""What a document of a synthetic task states and asks, before it is put into tokens or words."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError


class Statement(NamedTuple):
    """Key `key` gets the value `value`; with `is_copy`, what the key `value` has."""

    key: int
    value: int
    is_copy: bool = False


class Question(NamedTuple):
    """What is asked for, and the answers in the order in which they were stated.

    Attributes:
        subject: a key; in variable tracking a value, and the answers are the keys that have it.
    """

    subject: int
    answers: tuple[int, ...]


class Event(NamedTuple):
    """A statement or a question, and the share of the document that comes before it."""

    place: float
    what: Statement | Question


Step = tuple[Statement, Question | None]
Thread = list[Step]
"""Statements on one key or chain of keys in their order; a question may follow each of them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of document.

    Attributes:
        name: one of TASKS.
        pairs: keys, or chains of variables; a needle is a single one whatever this says.
        values: of each key in `multi_value` and `overwrite`, variables of each chain in
            `variable_tracking`.
        spread: questions stand anywhere after what they ask for, not at the end only: a signal at
            all distances to learn from. None is asked twice, as its answer would stand there.
        gap: the fewest tokens between a question and the last statement that it asks for. With as
            many as a segment has, no question stands in the segment of its answer.
    """

    name: str
    pairs: int = 4
    values: int = 3
    spread: bool = False
    gap: int = 0

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            nearest = get_close_matches(self.name, TASKS, n=1, cutoff=0)[0]
            raise DataError(
                f"task {self.name!r} is not known, did you mean {nearest}? Allowed: "
                f"{', '.join(TASKS)}"
            )
        for name in ("pairs", "values"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.gap < 0:
            raise DataError(f"gap = {self.gap}: must be 0 or more tokens")

    @property
    def symbols(self) -> int:
        """Different keys and values that a document may need."""
        if self.name == "needle":
            return 1
        keys = self.pairs * (self.values if self.name == "variable_tracking" else 1)
        return keys if self.name == "multi_key" else max(keys, self.values)

    @property
    def statements(self) -> int:
        pairs = 1 if self.name == "needle" else self.pairs
        return pairs * (1 if self.name in ("needle", "multi_key") else self.values)

    @property
    def questions(self) -> int:
        if self.name == "overwrite" and self.spread:
            return self.statements
        return 1 if self.name == "needle" else self.pairs

    @property
    def gaps(self) -> int:
        """How many gaps a document has one after the other."""
        return self.values if self.name == "overwrite" and self.spread else 1

    @property
    def answers(self) -> int:
        """Tokens that answer a question."""
        return self.values if self.name in ("multi_value", "variable_tracking") else 1


def random_numbers(seed: int, purpose: str, task: Task, *numbers: int) -> np.random.Generator:
    """What draws one document: a function of the seed, the task, and what else tells it apart.

    Args:
        purpose: documents to train on are none of those to evaluate with, whatever their seeds.
    """
    return np.random.default_rng([seed, zlib.crc32(f"{purpose} {task!r}".encode()), *numbers])


def tell(
    task: Task,
    symbols: int,
    rng: np.random.Generator,
    depth: float | None = None,
    apart: float = 0.0,
) -> list[Event]:
    """A story in order; questions at the end have places of 1 and more.

    Args:
        symbols: keys and values are numbers below this, at least `task.symbols`.
        depth: the place of a needle, 0 to 1; None draws it.
        apart: the least share of the document between a statement and a question that is not at
            the end, at most 1 / `task.gaps`.
    """
    threads = TASKS[task.name](task, symbols, rng)
    events: list[Event] = []
    for thread in threads:
        places = np.sort(rng.random(len(thread)))
        if depth is not None:
            places[:] = depth
        if task.spread:
            events += _ask_anywhere(thread, places, apart, rng)
        else:
            events += _ask_at_end(thread, places, rng)
    return sorted(events, key=lambda event: event.place)


def _ask_at_end(
    thread: Thread, places: NDArray[np.float64], rng: np.random.Generator
) -> list[Event]:
    question = thread[-1][1]
    assert question is not None, "the last statement of a thread is asked for"
    stated = [Event(float(place), what) for place, (what, _) in zip(places, thread, strict=True)]
    return [*stated, Event(1 + rng.random(), question)]


def _ask_anywhere(
    thread: Thread, places: NDArray[np.float64], apart: float, rng: np.random.Generator
) -> list[Event]:
    """Before the next statement of the thread, which may change the answer."""
    ends = np.append(places[1:], 1.0)
    asked = places + (ends - places) * rng.random(len(thread))
    # What is drawn is the text without gaps, and a gap goes before each question.
    gaps = np.cumsum([question is not None for _, question in thread])
    without = 1 - apart * gaps[-1]
    asked = without * asked + apart * gaps
    places = without * places + apart * np.append(0, gaps[:-1])
    events = []
    for place, when, (statement, question) in zip(places, asked, thread, strict=True):
        events.append(Event(float(place), statement))
        if question is not None:
            events.append(Event(float(when), question))
    return events


def _needle(task: Task, symbols: int, rng: np.random.Generator) -> list[Thread]:
    return [_pair(int(rng.integers(symbols)), int(rng.integers(symbols)))]


def _multi_key(task: Task, symbols: int, rng: np.random.Generator) -> list[Thread]:
    keys = _different(symbols, task.pairs, rng)
    values = rng.integers(symbols, size=task.pairs).tolist()
    return [_pair(key, value) for key, value in zip(keys, values, strict=True)]


def _pair(key: int, value: int) -> Thread:
    return [(Statement(key, value), Question(key, (value,)))]


def _multi_value(task: Task, symbols: int, rng: np.random.Generator) -> list[Thread]:
    return [
        _asked_last([Statement(key, value) for value in values], Question(key, tuple(values)))
        for key in _different(symbols, task.pairs, rng)
        for values in [_different(symbols, task.values, rng)]
    ]


def _overwrite(task: Task, symbols: int, rng: np.random.Generator) -> list[Thread]:
    return [
        [(Statement(key, value), Question(key, (value,))) for value in values]
        for key in _different(symbols, task.pairs, rng)
        for values in [_different(symbols, task.values, rng)]
    ]


def _variable_tracking(task: Task, symbols: int, rng: np.random.Generator) -> list[Thread]:
    names = _different(symbols, task.pairs * task.values, rng)
    threads = []
    for number, value in enumerate(_different(symbols, task.pairs, rng)):
        chain = names[number * task.values : (number + 1) * task.values]
        copies = [Statement(to, of, is_copy=True) for of, to in pairwise(chain)]
        question = Question(value, tuple(chain))
        threads.append(_asked_last([Statement(chain[0], value), *copies], question))
    return threads


def _asked_last(statements: Sequence[Statement], question: Question) -> Thread:
    return [*((statement, None) for statement in statements[:-1]), (statements[-1], question)]


def _different(symbols: int, count: int, rng: np.random.Generator) -> list[int]:
    drawn: list[int] = rng.choice(symbols, count, replace=False).tolist()
    return drawn


TASKS: dict[str, Callable[[Task, int, np.random.Generator], list[Thread]]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "overwrite": _overwrite,
}
